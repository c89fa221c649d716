import os
import signal

import pytest

from localdit.training.signals import SIGNALS, StopRequest


@pytest.fixture
def stop():
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    request = StopRequest()
    request.listen()
    yield request
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_are_noted_and_nothing_else_happens(stop, name):
    assert stop.signal is None
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.signal == name


def test_a_second_interrupt_ends_the_program(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
