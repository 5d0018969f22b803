"""Ctrl-C between calls of the device, never within one, where it would lose state."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While entered, the first SIGINT waits for `deliver`; a second interrupts at once.

    Outside of the main thread, where Python delivers no signals, and in a process that
    ignores it, as one started in a shell's background, it does nothing.
    """

    came: bool = False
    _before: Any = None

    def __enter__(self) -> "Interrupts":
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        # None: not Python's, which could not be put back.
        if in_main and before not in (None, signal.SIG_IGN):
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def deliver(self) -> None:
        """Hands a SIGINT that came to whom it was for: by default KeyboardInterrupt."""
        if self.came:
            self.came = False
            signal.raise_signal(signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
