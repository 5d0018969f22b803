"""A pytest plugin for memcheck.py: writes what ran, and ends the session in time, so
that compute-sanitizer can say its summary. Imports no JAX: conftest.py comes first."""

import json
import os
import time

import pytest

REPORT, UNTIL = "GDN_JAX_MEMCHECK_REPORT", "GDN_JAX_MEMCHECK_UNTIL"


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid, "outcome": report.outcome}
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if time.time() > float(os.environ[UNTIL]):
        item.session.shouldstop = "out of time"
        return True
    return None
