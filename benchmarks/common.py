"""What the benchmarks share: checks, timing, results files, tables."""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import peers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gdn_jax
from gdn_jax import testing, timing

RESULTS = pathlib.Path(__file__).parent / "results"
L2_BYTES = 64 * 2**20  # an H200's 60 MB, the largest of the GPUs this ran on
REPEATS = 30

console = Console(width=120)


class Problem(Protocol):
    """A dataclass whose fields are a row's columns in the results file."""

    @property
    def title(self) -> str: ...
    @property
    def moved_bytes(self) -> int: ...  # least traffic of a call


class Expected(NamedTuple):
    """What part of a result must be: `result[where]` close to `value`."""

    where: Any
    value: Any


Build = Callable[[Any, Mapping[str, Any]], peers.Call]


class Suite(NamedTuple):
    """What is measured: inputs, what is right, and who takes part.

    Attributes:
      inputs: their distribution, in words.
      make_inputs: a problem's inputs, on the device.
      expect: what a first call must leave, by name.
      tolerance: (problem, name, is_ours=) -> relative error up to which it is right.
      ours, peers: contenders of a problem. A failure of ours ends the run; a peer that
        fails is reported as absent.
    """

    name: str
    inputs: str
    make_inputs: Callable[[Any], Mapping[str, Any]]
    expect: Callable[[Any, Mapping[str, Any]], Mapping[str, Expected]]
    tolerance: Callable[..., float]
    ours: Callable[[Any], Mapping[str, Build]]
    peers: Callable[[Any], Mapping[str, Build]]


def errors_of(
    expected: Mapping[str, Expected], result: Mapping[str, Any]
) -> dict[str, float]:
    """Of what a first call left; a contender may not be able to tell all of it."""
    return {
        name: testing.relative_error(
            np.asarray(result[name][want.where], np.float32), want.value
        )
        for name, want in expected.items()
        if name in result
    }


def passed(tolerance: Callable[[str], float], errors: Mapping[str, float]) -> bool:
    """Up to the tolerance: of 0 all bits are wanted. NaN does not pass."""
    return all(error <= tolerance(name) for name, error in errors.items())


def wait() -> None:
    """For everything on the device, whichever framework launched it."""
    jax.block_until_ready(jax.live_arrays())
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()


def time_contender(
    suite: Suite, name: str, problem: Problem, inputs, expected
) -> dict[str, Any]:
    """One row of a results file; nothing that a peer does ends the run."""
    row = {"contender": name, **dataclasses.asdict(problem)}
    ours = suite.ours(problem)
    is_ours = name in ours
    build = ours[name] if is_ours else suite.peers(problem)[name]
    tolerance = functools.partial(suite.tolerance, problem, is_ours=is_ours)
    try:
        call = build(problem, inputs)
        return row | check_and_time(call, problem, expected, tolerance)
    except (peers.Unavailable, NotImplementedError) as reason:
        return row | {"absent": str(reason)}
    except Exception as error:
        if is_ours:
            raise
        return row | {"absent": f"failed: {type(error).__name__}: {error}"[:400]}


def check_and_time(
    call: peers.Call, problem: Problem, expected, tolerance: Callable[[str], float]
) -> dict[str, Any]:
    """What a row says of a call. `first_call_s` is what a user waits for the first
    call, compilation included; a peer may have compiled for an earlier problem."""
    wait()
    begin = time.perf_counter()
    call.run(0)
    wait()
    row = {"first_call_s": time.perf_counter() - begin}
    errors = errors_of(expected, call.result())
    row |= {"note": call.note, "errors": errors}
    if not passed(tolerance, errors):
        return row | {"absent": "errors above the tolerance"}
    found = timing.measure(call.run, REPEATS, wait=wait, belongs=call.kernels)
    row |= dataclasses.asdict(found)
    moved = call.moved_bytes or problem.moved_bytes
    row["tb_per_s"] = moved / found.median_us / 1e6
    return row


def package_hash() -> str:
    """Of gdn_jax's sources and tuned launches as they are here, committed or not."""
    root = pathlib.Path(gdn_jax.__file__).parent
    files = sorted([*root.rglob("*.py"), *root.rglob("tuned/*.json")])
    total = hashlib.sha256()
    for file in files:
        total.update(file.relative_to(root).as_posix().encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def header(inputs: str, repeats: int = REPEATS) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*words: str) -> str:
        command = ["git", *words]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "triton")
    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # a copy of the tree without its .git says its commit by the environment
        "commit": os.environ.get("GDN_JAX_COMMIT") or git("rev-parse", "HEAD"),
        "package": package_hash(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "inputs": inputs,
        "time": (
            f"device kernels, median of {repeats} calls that take turns through more "
            f"memory than the L2 cache holds"
        ),
    }


def results_folder(
    device: str, out: pathlib.Path | None = None, *, quick: bool = False
) -> pathlib.Path:
    """Of a run's files, made where it is not there: `out`, or the device's. A quick
    run's is in that, ignored by git: what is committed is of whole runs."""
    folder = RESULTS / device.lower().replace(" ", "_")
    folder = out or (folder / "quick" if quick else folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def commit_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What a row says where a file's rows were not all measured at once."""
    return {"commit": result["commit"], "date": result["date"]}


def rows_besides(
    measured: list[dict[str, Any]], *paths: pathlib.Path
) -> list[dict[str, Any]]:
    """The rows of the first results file there is, each with the commit and the date
    that it is of, but for those that say what one of `measured` says."""
    path = next(filter(pathlib.Path.is_file, paths), None)
    if path is None:
        return []
    old = json.loads(path.read_text())
    rows = [commit_of(old) | row for row in old["rows"]]
    return [
        row
        for row in rows
        if all({key: row.get(key) for key in found} != found for found in measured)
    ]


def need_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"The benchmarks time kernels on a GPU; JAX's default backend here is "
            f"{jax.default_backend()!r}."
        )


def run_suite(
    suite: Suite, problems: list, out: pathlib.Path | None, *, quick: bool
) -> pathlib.Path:
    """Checks and times every contender on every problem; prints and writes the rows,
    problem by problem. Gives the file that they are in."""
    need_gpu()
    result = header(suite.inputs)
    result |= {"copy_tb_per_s": timing.copy_bandwidth(), "rows": []}
    path = results_folder(result["device"], out, quick=quick) / f"{suite.name}.json"
    for problem in track(problems, description=suite.name, console=console):
        inputs = suite.make_inputs(problem)
        expected = suite.expect(problem, inputs)
        rows = [
            time_contender(suite, name, problem, inputs, expected)
            for name in (*suite.ours(problem), *suite.peers(problem))
        ]
        console.print(table(rows, problem, result["copy_tb_per_s"]))
        result["rows"] += rows
        path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {path}")
    return path


def table(rows: list[dict], problem: Problem, copy_tb_per_s: float) -> Table:
    """The rows of one problem, for people."""
    title = f"{problem.title}, copy {copy_tb_per_s:.2f} TB/s"
    shown = Table(title=title, title_justify="left")
    columns = ("contender", "us", "min", "max", "kernels", "TB/s", "of copy", "first s")
    for column in columns:
        shown.add_column(column, justify="left" if column == "contender" else "right")
    named = ", ".join(max((row.get("errors", {}) for row in rows), key=len))
    shown.add_column(f"errors ({named}) or why absent", overflow="fold")
    for row in rows:
        errors = " ".join(f"{e:.1e}" for e in row.get("errors", {}).values())
        if "absent" in row:
            shown.add_row(row["contender"], *[""] * 7, f"{row['absent']} {errors}")
            continue
        shown.add_row(
            row["contender"],
            *(f"{row[key]:.2f}" for key in ("median_us", "min_us", "max_us")),
            str(row["kernels"]),
            f"{row['tb_per_s']:.2f}",
            f"{row['tb_per_s'] / copy_tb_per_s:.0%}",
            f"{row['first_call_s']:.1f}",
            errors,
        )
    return shown
