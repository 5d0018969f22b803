"""Ctrl-C, answered at once wherever the main thread is.

Python's handlers of signals wait until the main thread is back from C, where a
compilation keeps it for many seconds, and the KeyboardInterrupt that they raise is lost
in the imports of some extensions. Python's own note of a signal waits for neither: a
byte in a socket, which a thread reads here.
"""

import os
import signal
import socket
import sys
import threading
from types import FrameType

from gdn_jax.generation.interrupts import can_be_handled

STATUS = 130  # what shells have for Ctrl-C
SHOW_CURSOR = b"\x1b[?25h\n"


class CtrlC:
    """While entered, Ctrl-C ends the process at once.

    Where there is a `warning`, the first one only shows it and is noted in `came`.

    Where it is not this thread's to handle it does nothing. They nest: the inner one
    answers.
    """

    came: bool = False

    def __init__(self, warning: str | None = None):
        self._warning = warning
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "CtrlC":
        if not can_be_handled():
            return self
        self._bytes, self._end = socket.socketpair()  # Windows takes no pipe
        self._end.setblocking(False)
        number = self._end.fileno()
        # The socket only has signals with a handler of Python's.
        self._handler = signal.signal(signal.SIGINT, self._note)
        self._outer = signal.set_wakeup_fd(number, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._outer)
        signal.signal(signal.SIGINT, self._handler)
        self._end.close()  # which ends the thread
        self._thread.join()
        self._bytes.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def _watch(self) -> None:
        warning = self._warning
        while byte := self._bytes.recv(1):
            if byte[0] != signal.SIGINT:
                continue
            if warning is None:
                _end()
            print(f"\n{warning}", file=sys.stderr, flush=True)
            warning = None


def _end() -> None:
    """By the system's calls alone: the main thread may hold a stream's lock."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)  # which a bar or a spinner hides
    os._exit(STATUS)
