"""Asking a run to end: SIGTERM, SIGINT and SIGUSR1 are noted, and obeyed between two steps."""

from __future__ import annotations

import signal
from types import FrameType

# What schedulers and people send: a cluster's time limit, Ctrl-C, `scancel --signal=USR1`.
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class StopRequest:
    """Notes the first of these signals; a second Ctrl-C ends the program at once.

    Attributes:
        signal: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def listen(self) -> None:
        """Take the signals over from now on. To be called in the main thread."""
        for name in SIGNALS:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
