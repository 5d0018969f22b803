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
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import memcheck_tests
import typer
from common import console, results_folder
from memcheck_parts import Part, Whole, join, read_parts

from gdn_jax import _triton

ROOT = pathlib.Path(__file__).parent.parent
# Whose buffers are allocations of their own, as long as they are: in a pool of JAX's a
# write past one is inside. Which of them are differs by JAX's version (`platform` is a
# pool since 0.10.1): the first is taken in which all that is planted is found.
ALLOCATORS = ("cuda_async", "address", "platform")
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # XLA's search for fast products runs hundreds of kernels that are not ours.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "PYTHONUNBUFFERED": "1",
}
# Memory behind every allocation that nothing may touch: a write far past one does not
# land in the next.
PADDING = 4096
SIZE, BLOCK = 1000, 8192  # of the buffer and of the program that writes it
PLANTED = {"none": 0, "one value": 1, "many values": 4096}  # past the end
# An error ends a process; the kernel that is planted shows that ours are still watched.
NOT_WATCHED = {
    "kernel": "input_scatter_fusion",
    "reason": (
        "XLA's own of scatters, by which tests make arrays, reads indices for threads "
        "that have none, up to 8 values past their end (JAX 0.11.2)"
    ),
}
OURS = "_kernel"  # in the name of every kernel of this project
TESTS_AT_ONCE = 16  # of a process
# Pools of gigabytes: as many processes at once do not fit, and what is checked of them
# is their values.
LEFT_OUT = ("test_large.py",)
SHOWN_LINES = 40


def plant(past: int) -> jax.Array:
    """A kernel of ours that writes its buffer, and so many values past its end."""

    def plant_kernel(x, out_ref):
        at = jnp.arange(BLOCK, dtype=jnp.int32)
        value = jnp.full((BLOCK,), 1.0) * _triton.load(x.at[0])
        _triton.store(out_ref.at[at], value, mask=at < SIZE + past)

    [out] = _triton.launch(
        plant_kernel,
        jnp.ones(1),
        (((SIZE,), jnp.float32),),
        grid=(1,),
        aliases={},
        num_warps=4,
        interpret=False,
    )
    return out


def environment(allocator: str) -> dict[str, str]:
    return {"XLA_PYTHON_CLIENT_ALLOCATOR": allocator} | ENVIRONMENT


class Watch(NamedTuple):
    """How tests are run: with which of JAX's allocators, and which kernels memcheck
    looks at."""

    allocator: str
    is_ours: bool = False

    @property
    def words(self) -> tuple[str, str]:
        if self.is_ours:
            return "--kernel-name", f"kns={OURS}"
        return "--kernel-name-exclude", f"kns={NOT_WATCHED['kernel']}"

    @property
    def text(self) -> str:
        if self.is_ours:
            return f"kernels with {OURS} in their names, which are all of gdn_jax's"
        return f"all kernels but {NOT_WATCHED['kernel']}"


def find_sanitizer() -> str:
    places = [shutil.which("compute-sanitizer")]
    places += map(str, sorted(pathlib.Path("/usr/local").glob("cuda*/bin/*sanitizer")))
    for place in filter(None, places):
        return place
    raise SystemExit("compute-sanitizer is not on PATH nor under /usr/local/cuda*/bin")


def version() -> str:
    command = [find_sanitizer(), "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""


def under_memcheck(
    command: list[str],
    log: pathlib.Path,
    watch: Watch,
    timeout: float,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Runs it; what memcheck says: `errors` is None where it said no summary."""
    sanitizer = [
        find_sanitizer(),
        *("--tool", "memcheck", "--report-api-errors", "no"),
        *watch.words,
        *("--padding", str(PADDING), "--log-file", str(log)),
    ]
    begun = time.perf_counter()
    try:
        run = subprocess.run(
            [*sanitizer, *command],
            cwd=ROOT,
            env=os.environ | environment(watch.allocator) | more,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        code, output = run.returncode, run.stdout[-4000:] + run.stderr[-4000:]
    except subprocess.TimeoutExpired as late:
        code, output = None, str(late)[:200]
    seconds = round(time.perf_counter() - begun, 1)
    said = log.read_text(errors="replace") if log.exists() else ""
    return {"code": code, "seconds": seconds} | summary(said) | {"output": output}


def summary(said: str) -> dict[str, Any]:
    """Of memcheck's log."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", said)]
    lines = [line.removeprefix("=========").strip() for line in said.splitlines()]
    kinds = collections.Counter(
        line for line in lines if re.match(r"(Invalid|Misaligned|Out-of-range) ", line)
    )
    at = re.findall(r"^=+ +at (\S+?)\+0x", said, flags=re.MULTILINE)
    has_errors = sum(counts) > 0 or bool(kinds)
    return {
        "errors": max(sum(counts), kinds.total()) if counts or kinds else None,
        "kinds": dict(kinds.most_common(20)),
        "kernels": dict(collections.Counter(at).most_common(20)),
        "lines": lines[:SHOWN_LINES] if has_errors or not counts else [],
    }


def find_allocator(
    folder: pathlib.Path, allocators: Sequence[str], is_ours: bool
) -> tuple[Watch, dict[str, Any]]:
    """(with the first allocator with which memcheck finds what is planted and nothing
    else, what it finds with each). Raises where there is none."""

    def run_one(allocator: str, name: str) -> dict[str, Any]:
        log = folder / f"plant_{allocator}_{name.replace(' ', '_')}.log"
        command = [sys.executable, __file__, "--plant", name]
        return under_memcheck(command, log, Watch(allocator, is_ours), timeout=240)

    found: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = {
            (allocator, name): pool.submit(run_one, allocator, name)
            for allocator in allocators
            for name in PLANTED
        }
        for (allocator, name), future in runs.items():
            run = future.result()
            what = f"{allocator}: planted {name}: {run['errors']} errors"
            console.print(what, run["kinds"], markup=False)
            if run["errors"] is None:
                console.print(run["output"], run["lines"], markup=False)
            keys = ("errors", "kinds", "seconds")
            found.setdefault(allocator, {})[name] = {key: run[key] for key in keys}
    for allocator, planted in found.items():
        errors = {name: run["errors"] for name, run in planted.items()}
        if None not in errors.values() and all(
            (PLANTED[name] > 0) == (n > 0) for name, n in errors.items()
        ):
            return Watch(allocator, is_ours), found
    raise SystemExit("memcheck does not find what is planted, whatever the allocator")


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
    plant_name: str = typer.Option("", "--plant"),
    join_parts: bool = typer.Option(False, "--join"),
    out: pathlib.Path | None = None,
) -> None:
    until = time.time() + 60 * minutes
    if plant_name:
        jax.block_until_ready(plant(PLANTED[plant_name]))
        return
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
