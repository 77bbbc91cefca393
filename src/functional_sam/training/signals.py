"""SIGINT, SIGTERM and SIGUSR2: finish the step, save, leave with a code that says "resumable"."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from functional_sam.errors import Interrupted

__all__ = ["SIGNALS", "Interrupted", "Stop"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stop:
    """Once installed, the first signal sets `requested` to its name, and a second SIGINT ends the process at once.

    With `at_once` there is no step to finish: the signal raises Interrupted, with these words, where it arrives. Outside the main
    thread, where Python allows no handlers, nothing is ever requested. Usable as a context manager.
    """

    def __init__(self, at_once: str = ""):
        self.at_once = at_once
        self.requested: str | None = None
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def install(self) -> None:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def restore(self) -> None:
        """Give them back to whom they were taken from."""
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def __enter__(self) -> "Stop":
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.at_once:
            raise Interrupted(f"stopped by {name}: {self.at_once}")
        if number == signal.SIGINT and self.requested == name:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if self.requested is None or number == signal.SIGINT:
            self.requested = name
