"""benchmarks/memcheck.py without a GPU: what it plants lowers for one, and what a
sanitizer says is counted."""

import importlib
import json
import pathlib

import aot
import pytest

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
# In place of the tool: runs the command, and says of each plant and of one test an
# error.
SANITIZER = """#!/bin/sh
while [ "$1" != --log-file ]; do [ "$1" = --version ] && exit; shift; done
log=$2; shift 2; errors=0
case "$*" in *"planted.py one value"|*"planted.py many values"|*test_faulty*)
  echo "========= Invalid __global__ write of size 4 bytes" >"$log"
  echo "=========     at some_kernel+0x70" >>"$log"; errors=1;; esac
case "$*" in *planted.py*) ;; *) "$@";; esac
echo "========= ERROR SUMMARY: $errors errors" >>"$log"
"""


@pytest.fixture
def memcheck(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("memcheck")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setattr("memcheck_sanitizer.find_sanitizer", lambda: str(tool))
    return module


def test_what_is_planted_lowers_for_a_gpu(memcheck):
    planted = importlib.import_module("memcheck_planted")
    for past in planted.PLANTED.values():
        assert aot.KERNEL_CALL in aot.lower(lambda past=past: planted.plant(past))


def _run(memcheck, folder, monkeypatch, source, **options):
    """Of tests of a file that is written for it."""
    file = folder / "test_some.py"
    file.write_text(source)
    names = [line[4:-3] for line in source.splitlines() if line.startswith("def ")]
    found = [f"{file.name}::{name}" for name in names]
    monkeypatch.setattr(memcheck, "collect", lambda tests: found)
    for name in ("memcheck", "memcheck_sanitizer"):
        monkeypatch.setattr(f"{name}.ROOT", folder)
    with pytest.raises(SystemExit) as end:
        memcheck.main(None, out=folder, **_options(**options))
    return end.value.code, json.loads((folder / "memcheck_1.json").read_text())


def _options(**given):
    options = dict(part="1/1", minutes=2.0, workers=1, at_once=16, quick=False)
    options |= dict(rest=False, ours=False, join_parts=False)
    return options | given


def _counts(result):
    names = ("passed", "failed", "not_run", "unchecked")
    return [len(result[name]) for name in names]


def test_clean_tests_are_counted(memcheck, tmp_path, monkeypatch):
    source = "def test_a():\n    pass\ndef test_b():\n    pass\n"
    code, result = _run(memcheck, tmp_path, monkeypatch, source)
    assert (code, result["errors"], _counts(result)) == (0, 0, [2, 0, 0, 0])
    assert result["planted"]["one value"]["errors"] == 1
    assert (result["part"], result["collected"], result["left_out"]) == ("1/1", 2, [])


def test_an_error_is_reported(memcheck, tmp_path, monkeypatch):
    source = "def test_faulty():\n    pass\n"
    code, result = _run(memcheck, tmp_path, monkeypatch, source)
    assert (code, result["errors"]) == (1, 1)
    assert result["reports"][0]["kinds"]
    assert result["reports"][0]["kernels"] == {"some_kernel": 1}


def test_what_its_time_leaves_out_is_listed(memcheck, tmp_path, monkeypatch):
    source = (
        "import os\ndef test_a():\n    os.environ['GDN_JAX_MEMCHECK_UNTIL'] = '0'\n"
    )
    source += "def test_b():\n    pass\n"
    code, result = _run(memcheck, tmp_path, monkeypatch, source)
    assert (code, _counts(result)) == (0, [1, 0, 1, 0])
    assert result["not_run"][0].endswith("test_b")


def test_a_plant_that_is_missed_ends_the_run(memcheck, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.replace("one value", "nothing"))
    with pytest.raises(SystemExit, match="memcheck does not find what is planted"):
        memcheck.main(None, out=tmp_path, **_options())


def test_an_allocator_with_which_the_plant_is_found_is_taken(
    memcheck, tmp_path, monkeypatch
):
    tool, chosen = tmp_path / "compute-sanitizer", memcheck.ALLOCATORS[1]
    finds = f'[ "$XLA_PYTHON_CLIENT_ALLOCATOR" = {chosen} ] && case'
    tool.write_text(SANITIZER.replace("case", finds, 1))
    source = "def test_a():\n    pass\n"
    code, result = _run(memcheck, tmp_path, monkeypatch, source)
    assert code == 0
    assert result["environment"]["XLA_PYTHON_CLIENT_ALLOCATOR"] == chosen
    assert result["planted_with"][chosen] == result["planted"]
    assert result["planted_with"][memcheck.ALLOCATORS[0]]["one value"]["errors"] == 0


def _part(folder, part, **others):
    """Of three tests: what the part ran, and one that no part runs."""
    about = dict(part=part, commit="one", package="two", collected=3, left_out=["c"])
    about |= dict(watched="all", date="2026-01-01")
    names = ("failed", "skipped", "not_run", "unchecked", "reports")
    lists: dict[str, list[str]] = {name: [] for name in names}
    told = about | lists | dict(passed=["a"], errors=0, seconds=1.0) | others
    name = f"rest_{part}" if "rest" in part else part
    (folder / f"memcheck_{name.split('/')[0]}.json").write_text(json.dumps(told))


def test_parts_make_one_file(memcheck, tmp_path):
    _part(tmp_path, "1/2")
    _part(tmp_path, "2/2", passed=[], not_run=["b"], errors=4)
    memcheck.join(tmp_path)
    whole = json.loads((tmp_path / "memcheck.json").read_text())
    assert (whole["part"], whole["errors"], whole["seconds"]) == ("1/2, 2/2", 4, 2.0)
    assert (whole["collected"], whole["left_out"]) == (3, ["c"])
    assert _counts(whole) == [1, 0, 1, 0]


def test_what_took_up_the_rest_comes_after(memcheck, tmp_path):
    """A test that was interrupted, and one that there was no time for."""
    hung = dict(errors=None, tests=["a", "b"])
    _part(tmp_path, "1/1", unchecked=["a"], not_run=["b"], reports=[hung])
    rest = dict(passed=["a"], skipped=["b"], watched="ours")
    _part(tmp_path, "1/1 of the rest", **rest)
    memcheck.join(tmp_path)
    whole = json.loads((tmp_path / "memcheck.json").read_text())
    assert _counts(whole) == [1, 0, 0, 0] and whole["skipped"] == ["b"]
    assert whole["watched"] == {"all": 0, "ours": 2} and whole["reports"] == []


def test_what_failed_once_has_failed(memcheck, tmp_path):
    _part(tmp_path, "1/1", passed=["b"], failed=["a"])
    _part(tmp_path, "1/1 of the rest", passed=["a"])
    memcheck.join(tmp_path)
    whole = json.loads((tmp_path / "memcheck.json").read_text())
    assert (whole["passed"], whole["failed"]) == (["b"], ["a"])


def test_the_rest_is_what_has_not_passed(memcheck, tmp_path, monkeypatch):
    source = "def test_a():\n    pass\ndef test_b():\n    pass\n"
    _run(memcheck, tmp_path, monkeypatch, source)
    path = tmp_path / "memcheck_1.json"
    first = json.loads(path.read_text())
    first["not_run"] = [first["passed"].pop()]
    path.write_text(json.dumps(first))
    with pytest.raises(SystemExit) as end:
        memcheck.main(None, out=tmp_path, **_options(rest=True, ours=True))
    rest = json.loads((tmp_path / "memcheck_rest_1.json").read_text())
    assert (end.value.code, rest["passed"]) == (0, first["not_run"])
    assert list(rest["planted_with"]) == [memcheck.ALLOCATORS[0]]
    assert "kernels with _kernel in their names" in rest["watched"]


def test_a_test_that_takes_too_long_is_interrupted(memcheck, tmp_path, monkeypatch):
    """So that what passed before it is told of."""
    source = "def test_a():\n    pass\ndef test_b():\n    import time\n"
    source += "    time.sleep(300)\n"
    code, result = _run(memcheck, tmp_path, monkeypatch, source, minutes=0.8)
    assert (code, _counts(result)) == (0, [1, 0, 1, 0])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "all parts of one count in .*; got none"),
        ({"1/2": {}}, "got 1/2. Run those that are missing"),
        ({"2/2": {}}, "got 2/2"),
        ({"1/1": {}, "2/2": {}}, "got 1/1, 2/2"),
        ({"1/2": {}, "2/2": dict(commit="other")}, "of one commit, package"),
        ({"1/2": {}, "2/2": dict(collected=4)}, "and number of tests"),
        ({"1/2": {}, "2/2": dict(passed=[])}, "an outcome of each of 3 tests"),
        ({"1/1": {}}, "an outcome of each of 3 tests; got {'passed': 1"),
    ],
    ids=str,
)
def test_parts_that_are_not_of_one_whole_run_are_not_joined(
    parts, message, memcheck, tmp_path
):
    for part, others in parts.items():
        _part(tmp_path, part, **others)
    with pytest.raises(SystemExit, match=message):
        memcheck.join(tmp_path)
    assert not (tmp_path / "memcheck.json").exists()
