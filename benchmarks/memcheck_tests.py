"""A pytest plugin for memcheck.py: writes what ran, and ends the session in time, so
that compute-sanitizer can say its summary. Imports no JAX: conftest.py comes first."""

import json
import os
import signal
import time

import pytest

REPORT, UNTIL = "GDN_JAX_MEMCHECK_REPORT", "GDN_JAX_MEMCHECK_UNTIL"


def pytest_sessionstart(session):
    """A test that is still running then is interrupted, as by Ctrl-C."""
    del session
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(1, _left()))


def _left():
    return float(os.environ[UNTIL]) - time.time()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid, "outcome": report.outcome}
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if _left() <= 0:
        item.session.shouldstop = "out of time"
        return True
    return None
