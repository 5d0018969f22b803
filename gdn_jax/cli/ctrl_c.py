"""Ctrl-C that is heard while XLA compiles.

Python runs the handler of a signal between two of its own instructions, and a
compilation, of many seconds, is one. So a thread waits for what the signal itself
writes.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

EXIT = 130  # what shells have for Ctrl-C


class Presses:
    """While entered, `on_press` is called by a thread, at once, with how many times
    Ctrl-C has been pressed since; it may be replaced on the way. `came` tells of it as
    soon as the main thread is Python's again.

    As `Interrupts` it stays out of other threads and of processes that ignore Ctrl-C.
    """

    came: bool = False
    _before: Any = None

    def __init__(self, on_press: Callable[[int], None]):
        self.on_press = on_press

    def __enter__(self) -> "Presses":
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and before not in (None, signal.SIG_IGN):
            self._before = before
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)  # as set_wakeup_fd demands
            self._old = signal.set_wakeup_fd(self._write.fileno())
            signal.signal(signal.SIGINT, self._note)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            return
        signal.signal(signal.SIGINT, self._before)
        signal.set_wakeup_fd(self._old)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def _listen(self) -> None:
        count = 0
        while numbers := self._read.recv(64):  # nothing once the other end is closed
            for _ in range(numbers.count(signal.SIGINT)):
                count += 1
                self.on_press(count)


def leave() -> None:
    """Ends the process without asking whoever computes in it."""
    os._exit(EXIT)
