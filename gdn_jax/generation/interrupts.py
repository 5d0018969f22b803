"""Ctrl-C between calls of the device, never within one, where it would lose state."""

import signal
import threading
from types import FrameType
from typing import Any


def can_be_handled() -> bool:
    """Whether SIGINT is this thread's to handle: not outside of the main thread, where
    Python delivers no signals, nor in a process that ignores it, as one started in a
    shell's background, nor where the handler (None) is not Python's and could not be
    put back."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN)


class Interrupts:
    """While entered, the first SIGINT waits for `deliver`; a second interrupts at once.
    Where it is not this thread's to handle it does nothing."""

    came: bool = False
    _before: Any = None

    def __enter__(self) -> "Interrupts":
        if can_be_handled():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        before, self._before = self._before, None  # another thread may be the next
        if before is not None:
            signal.signal(signal.SIGINT, before)

    def deliver(self) -> None:
        """Hands a SIGINT that came to whom it was for: by default KeyboardInterrupt."""
        if self.came:
            self.came = False
            signal.raise_signal(signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
