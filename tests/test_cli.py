"""The command line, as a shell calls it."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gdn_jax import cli, testing

ONE = ["check", "-k", "decode, KDA"]


def _run(*words):
    return CliRunner().invoke(cli.app, words)


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

    original = cli.gdn_jax.fused_update
    monkeypatch.setattr(cli.gdn_jax, "fused_update", update)
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
