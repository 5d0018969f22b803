"""The command line, as a shell calls it."""

import re
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gdn_jax import _check, testing
from gdn_jax.cli import checking
from gdn_jax.cli.commands import app

ONE = ["check", "-k", "decode, KDA"]


def _run(*words):
    return CliRunner().invoke(app, words)


def test_info_says_what_none_picks():
    found = subprocess.run(
        [sys.executable, "-m", "gdn_jax", "info"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "None picks" in found.stdout


def test_check_prints_a_line_for_each_implementation():
    found = _run(*ONE, "-i", "xla", "-i", "reference")
    assert found.exit_code == 0, found.output
    assert "2 of 2 passed" in found.output


@pytest.mark.parametrize("op", ["chunk_update: ragged", "causal_conv1d: decode, b"])
def test_check_knows_every_op(op):
    found = _run("check", "-k", op, "-i", "xla")
    assert found.exit_code == 0, found.output
    assert "1 of 1 passed" in found.output


def test_the_table_fits_80_columns():
    """Every case on a line of its own, with the widest numbers."""
    problems = _check.problems(large=True)
    ops = [problem.op for problem in problems]
    assert ops.count("chunk_update") == len(_check.OF_CHUNK_CASES)
    assert ops.count("causal_conv1d") == len(_check.OF_CONV_CASES)
    rows = [
        _check.Row(problem, "reference", (1e-7, 1e-3), (1.0, 1.0), 123456.7, 10**9)
        for problem in problems
    ]
    console = Console(width=80)
    for copy in (None, 4000.0):
        with console.capture() as printed:
            console.print(checking._table(rows, copy))
        for row in rows:
            whole = re.escape(row.problem.case.name) + " +reference .* ok *"
            assert re.search(f"^{whole}$", printed.get(), re.MULTILINE)


def test_check_fails_on_a_wrong_result(monkeypatch):
    monkeypatch.setitem(testing.TOLERANCE, ("state", "float32"), 0.0)
    found = _run(*ONE, "-i", "xla")
    assert found.exit_code == 1
    assert "0 of 1 passed" in found.output


def test_check_reports_what_raises_and_goes_on(monkeypatch):
    def update(*args, implementation, **kwargs):
        if implementation == "xla":
            raise RuntimeError("out of luck")
        return original(*args, implementation=implementation, **kwargs)

    original = checking.gdn_jax.fused_update
    monkeypatch.setattr(checking.gdn_jax, "fused_update", update)
    found = _run(*ONE, "-i", "xla", "-i", "reference")
    assert found.exit_code == 1
    assert "RuntimeError: out of luck" in found.output
    assert "1 of 2 passed" in found.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["check", "-i", "cuda"], "implementation must be None or one of"),
        (["check", "-k", "no such case"], "no case's name contains"),
    ],
)
def test_a_wrong_option_is_told(words, text):
    found = _run(*words)
    assert found.exit_code == 2
    assert text in found.output
