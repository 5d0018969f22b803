"""The command line, as a shell calls it."""

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

import gdn_jax
from gdn_jax import _check, testing
from gdn_jax.cli import checking, training
from gdn_jax.cli.commands import app
from gdn_jax.training import text
from gdn_jax.training.recipe import Recipe

ONE = ["check", "-k", "decode, KDA"]


def _run(*words):
    return CliRunner().invoke(app, words)


def test_info_says_what_none_picks():
    found = subprocess.run(
        [sys.executable, "-m", "gdn_jax", "info"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "None picks" in found.stdout


def test_the_version():
    assert _run("--version").output == f"gdn-jax {gdn_jax.__version__}\n"


def test_check_prints_a_line_for_each_implementation():
    found = _run(*ONE, "-i", "xla", "-i", "reference")
    assert found.exit_code == 0, found.output
    assert "2 of 2 passed" in found.output


@pytest.mark.parametrize(
    "op",
    ["chunk_update: ragged", "causal_conv1d: decode, b", "replay_update: packed"],
)
def test_check_knows_every_op(op):
    found = _run("check", "-k", op, "-i", "xla")
    assert found.exit_code == 0, found.output
    assert "1 of 1 passed" in found.output


def test_the_table_fits_80_columns():
    """Every case on a line of its own, with the widest numbers."""
    problems = _check.problems(large=True)
    ops = [problem.op for problem in problems]
    assert ops.count("chunk_update") == len(_check.OF_CHUNK_CASES)
    assert ops.count("replay_update") == len(_check.OF_REPLAY_CASES)
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
    ("words", "said"),
    [
        (["check", "-i", "cuda"], "'cuda' is none of triton"),
        (["check", "-k", "no such case"], "no case's name contains"),
        (["generate", "--top-p", "0"], "'--top-p': 0 is not in (0, 1]"),
        (["generate", "--top-p", "2"], "'--top-p': 2 is not in (0, 1]"),
        (["generate", "--dtype", "int8"], "'int8' is not one of 'float32'"),
        (["train", "folder", "--dtype", "int8"], "'int8' is not one of 'float32'"),
    ],
)
def test_a_wrong_option_is_told(words, said):
    found = _run(*words)
    assert found.exit_code == 2
    assert said in found.output


def test_train_by_default_is_the_recipe():
    given = inspect.signature(training.train).parameters
    fields = dataclasses.asdict(Recipe())
    shared = fields.keys() & given.keys()
    assert shared == {"steps", "batch", "length", "learning_rate", "seed"}
    assert {name: given[name].default for name in shared} == {
        name: fields[name] for name in shared
    }


@pytest.fixture(scope="module")
def a_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    text.save(text.Corpus(bytes(99), bytes(99), "3.12"), path)
    return str(path)


@pytest.mark.parametrize("folder", ["file", "file/folder"])
def test_train_fails_at_once_where_it_cannot_save(folder, a_text, tmp_path):
    (tmp_path / "file").touch()
    found = _run("train", str(tmp_path / folder), "--text", a_text)
    assert found.exit_code == 1
    assert found.output.startswith("FOLDER ")
    assert found.output.endswith("Wanted: a folder that can be written to.\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "--text nowhere: No such file or directory. Wanted: a text that"),
        (__file__, f"--text: {__file__} must be text that gdn_jax.training.text.save"),
    ],
)
def test_train_says_which_text_is_wrong(name, said, tmp_path):
    found = _run("train", str(tmp_path / "run"), "--text", name)
    assert found.exit_code == 1
    assert found.output.startswith(said)
    assert not (tmp_path / "run").exists()
