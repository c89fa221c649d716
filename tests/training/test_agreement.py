import pytest
from accelerate import Accelerator

from localdit.training.agreement import Agreement, TrainingStopped


@pytest.fixture
def agreement():
    return Agreement(Accelerator(cpu=True))


def test_alone_there_is_nothing_to_agree_on(agreement):
    assert agreement.total(1, True, 2.5) == [1.0, 1.0, 2.5]
    assert agreement.gathered(["a", "b"]) == ["a", "b"]
    assert agreement.on_main(lambda: 3) == agreement.on_all(lambda: 3) == 3


@pytest.mark.parametrize("error", [OSError, ValueError, ModuleNotFoundError])
def test_what_a_user_can_mend_is_told_in_a_line(agreement, error):
    def fail():
        raise error("the reason")

    for call in (agreement.on_main, agreement.on_all):
        with pytest.raises(TrainingStopped, match="the reason"):
            call(fail)


def test_other_errors_are_ours_and_keep_their_traceback(agreement):
    def fail():
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        agreement.on_all(fail)
