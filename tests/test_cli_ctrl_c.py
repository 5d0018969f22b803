"""Ctrl-C of the command, wherever it comes."""

import signal
import subprocess
import sys
import threading

from gdn_jax.cli.ctrl_c import CtrlC

# A process that was started in the background ignores Ctrl-C, and so do its children.
BEGIN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

DURING_IMPORTS = """
def interrupt(event, args):
    if event == "import" and args[0] == "jax":
        signal.raise_signal(signal.SIGINT)

sys.addaudithook(interrupt)
from gdn_jax.cli import main
main()
"""

# As in a compilation the interpreter's lock is free and its handlers wait.
IN_C = """
import ctypes, threading
from gdn_jax.cli.ctrl_c import CtrlC

def interrupt():
    for _ in range(int(sys.argv[1])):
        time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
with CtrlC(warning="once more") as ctrl_c:
    ctypes.CDLL(None).sleep(1)
    print("went on", ctrl_c.came, flush=True)
"""


def run(code, *words):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_it_is_quiet_during_imports():
    assert run(DURING_IMPORTS) == (130, "")


def test_the_first_is_answered_while_the_main_thread_is_in_c():
    assert run(IN_C, "1") == (0, "\nonce more\nwent on True\n")


def test_the_second_ends_the_process_while_the_main_thread_is_in_c():
    assert run(IN_C, "2") == (130, "\nonce more\n")


def test_handlers_are_put_back(interruptible):
    before = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    with CtrlC(), CtrlC("inner"):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)) == before


def test_other_threads_leave_it_alone(interruptible):
    before, inside = signal.getsignal(signal.SIGINT), []

    def enter():
        with CtrlC() as ctrl_c:
            inside.append((signal.getsignal(signal.SIGINT), ctrl_c.came))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
