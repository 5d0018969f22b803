"""compute-sanitizer's memcheck over the gpu-marked tests:
python benchmarks/memcheck.py [--quick] [--part 1/4] [--rest] [--ours] [--minutes 8]

First it must find writes past a buffer that are planted in a kernel, and nothing in the
same kernel without them. Every part takes other tests; what its time leaves out is
listed in its results file, and `--rest` takes that up. `--ours` watches the kernels of
this project alone: XLA's and cuBLAS's take most of the time. `--join` makes one file of
all.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import memcheck_tests
import typer
from common import console, results_folder
from memcheck_parts import Part, Whole, join, read_parts
from memcheck_planted import ALLOCATORS, find_allocator
from memcheck_sanitizer import (
    NOT_WATCHED,
    PADDING,
    ROOT,
    Watch,
    environment,
    under_memcheck,
    version,
)

TESTS_AT_ONCE = 16  # of a process
# Pools of gigabytes: as many processes at once do not fit, and what is checked of them
# is their values.
LEFT_OUT = ("test_large.py",)


def collect(chosen: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", *(chosen or ["tests"])]
    command.append("--ignore=tests/test_notebooks.py")  # which needs more packages
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in run.stdout.splitlines() if line.startswith("tests/")]
    if run.returncode != 0 or not found:
        raise SystemExit(f"no gpu-marked tests:\n{run.stdout[-2000:]}{run.stderr}")
    return found


def chunks(tests: list[str], most: int) -> list[list[str]]:
    """At most so many of a file's tests, which share what they compile."""
    files = collections.defaultdict(list)
    for test in tests:
        files[test.split("::")[0]].append(test)
    return [
        group[i : i + most]
        for group in files.values()
        for i in range(0, len(group), most)
    ]


def run_chunk(
    number: int, tests: list[str], folder: pathlib.Path, watch: Watch, until: float
) -> dict[str, Any]:
    left = until - time.time()
    if left < 40:  # JAX itself takes half of that to start
        return {"tests": tests, "ran": {}, "errors": 0, "late": True, "has_run": True}
    report = folder / f"report_{number}.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-x"]
    command += ["-p", "no:cacheprovider", "-p", "memcheck_tests", *tests]
    paths = [str(pathlib.Path(__file__).parent), str(ROOT)]
    paths.append(os.environ.get("PYTHONPATH", ""))
    more = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        memcheck_tests.REPORT: str(report),
        memcheck_tests.UNTIL: str(until - 20),
    }
    log = folder / f"{number}.log"
    run = under_memcheck(command, log, watch, left + 30, more)
    lines = report.read_text().splitlines() if report.exists() else []
    ran = {each["test"]: each["outcome"] for each in map(json.loads, lines)}
    # 2 is how the plugin ends a run whose time is up
    has_run = run["code"] in (0, 2)
    if has_run and run["errors"] == 0 and "failed" not in ran.values():
        del run["output"], run["lines"]
    return {"tests": tests, "ran": ran, **run, "late": False, "has_run": has_run}


def about(part: str, watch: Watch, planted: dict[str, Any]) -> dict[str, Any]:
    return {
        "part": part,
        "watched": watch.text,
        "environment": environment(watch.allocator),
        "padding": PADDING,
        "not_watched": NOT_WATCHED,
        "sanitizer": version(),
        "planted": planted[watch.allocator],
        "planted_with": planted,
    }


def run_groups(
    groups: list[list[str]],
    results: Part,
    logs: pathlib.Path,
    watch: Watch,
    until: float,
    workers: int,
) -> None:
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [
            pool.submit(run_chunk, number, group, logs, watch, until)
            for number, group in enumerate(groups)
        ]
        for future in concurrent.futures.as_completed(running):
            chunk = future.result()
            results.add(chunk)
            file, seconds = chunk["tests"][0].split("::")[0], chunk.get("seconds", 0)
            console.print(f"{seconds:6} s  {file}  {results.line()}")


def main(
    tests: list[str] = typer.Argument(None),  # noqa: B008
    part: str = "1/1",
    minutes: float = 8.5,
    workers: int = 8,
    at_once: int = typer.Option(TESTS_AT_ONCE, help="tests of a process, at most"),
    quick: bool = False,
    rest: bool = typer.Option(False, help="what runs in --out left, as parts of it"),
    ours: bool = typer.Option(False, help="watch the kernels of this project alone"),
    join_parts: bool = typer.Option(False, "--join"),
    out: pathlib.Path | None = None,
) -> None:
    until = time.time() + 60 * minutes
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # memory is for the tests
    folder = results_folder(jax.devices()[0].device_kind, out, quick=quick)
    if join_parts:
        join(folder)
        return
    index, count = map(int, part.split("/"))
    if not 1 <= index <= count:
        raise SystemExit(f"--part must be like 2/4; got {part}")
    earlier = Whole(read_parts(folder)) if rest else None
    allocators = (earlier.allocator,) if earlier else ALLOCATORS
    with tempfile.TemporaryDirectory() as name:
        logs = pathlib.Path(name)
        watch, planted = find_allocator(logs, allocators, ours)
        found = collect(tests or [])
        left_out = [x for x in found if any(f"/{file}::" in x for file in LEFT_OUT)]
        done = {*left_out, *(earlier.done if earlier else ())}
        groups = chunks([test for test in found if test not in done], at_once)
        groups = groups[index - 1 :: count][: 2 if quick else None]
        total = sum(map(len, groups))
        console.print(f"part {part}: {total} of {len(found)} tests")
        path = folder / f"memcheck_{'rest_' if rest else ''}{index}.json"
        known = about(f"{part}{' of the rest' if rest else ''}", watch, planted)
        results = Part(path, known | {"collected": len(found), "left_out": left_out})
        run_groups(groups, results, logs, watch, until, workers)
    result = results.result
    for report in result["reports"]:
        console.print(report, highlight=False)
    console.print(f"wrote {results.path}")
    bad = result["errors"] or result["failed"] or result["unchecked"]
    bad = bad or not result["passed"]
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
