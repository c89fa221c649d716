import contextlib
import resource
import signal

import pytest
from hypothesis import settings

# A shared machine may be slow at any moment: how long an example takes says nothing.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture
def full_disk():
    """A context in which no file grows beyond a size in bytes, as if the disk were full."""

    @contextlib.contextmanager
    def full(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return full
