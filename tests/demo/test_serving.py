import socket

import pytest

from localdit.demo.serving import FIRST_PORT, free_port


def test_a_free_port_is_taken_as_asked():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert free_port("127.0.0.1", port) == port


def test_a_busy_port_is_told_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is taken; give another --port, or leave"):
            free_port("127.0.0.1", port)


def test_without_a_port_the_first_free_one_is_taken():
    first = free_port("127.0.0.1", None)
    assert first >= FIRST_PORT
    with socket.create_server(("127.0.0.1", first)):
        assert free_port("127.0.0.1", None) > first


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "1.2.3"])
def test_hosts_that_are_not_of_this_machine_are_told(host):
    with pytest.raises(OSError, match=f"--host .*{host}"):
        free_port(host, None)
