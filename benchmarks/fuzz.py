"""Random calls of our kernel against vLLM's: python benchmarks/fuzz.py [--quick]

10,000 calls over 60 compiled shapes, all drawn from a seed that is printed; a call that
fails is printed with the words that replay it alone. `--against oracle` compares with
float64 instead, on any machine: `--implementation interpret` or `xla` without a GPU.
So do `--op replay_update`, whose cases are schedules of calls, and `--op
fused_layer_step`, compared with the ops that it is made of.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import typer
from common import console, header, results_folder
from fuzz_calls import Calls, Found, Wrong
from fuzz_steps import LayerSteps, Replays
from peers import Unavailable

from gdn_jax import testing

MOST_FAILURES = 20
AHEAD = 48  # calls drawn while others run
COMPILED_AHEAD = 4


def ahead(
    pool: concurrent.futures.Executor, function: Callable, items: Iterable, count: int
) -> Iterator[tuple[Any, concurrent.futures.Future]]:
    """(item, its future) in order, `count` of them begun before they are asked for."""
    waiting = collections.deque()
    items = iter(items)
    for item in itertools.islice(items, count):
        waiting.append((item, pool.submit(function, item)))
    while waiting:
        item, future = waiting.popleft()
        for following in itertools.islice(items, 1):
            waiting.append((following, pool.submit(function, following)))
        yield item, future


class Run:
    """A run of many calls, its results written after every set of shapes."""

    def __init__(self, subject: Any, *, seed, cases, sets, path):
        self.subject, self.path = subject, path
        self.seed, self.cases, self.sets = seed, cases, sets
        self.begun, self.done = time.perf_counter(), 0
        self.failures: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.header = header(subject.inputs)
        del self.header["time"]
        pool = concurrent.futures.ThreadPoolExecutor
        self.drawing = pool(min(8, os.cpu_count() or 1))
        self.compiling = pool(COMPILED_AHEAD)

    def compile(self, number: int) -> tuple[Any, Callable]:
        shapes = self.subject.shapes(self.seed, number)
        return shapes, self.subject.compile(shapes, self.seed)

    def words(self, case: int) -> str:
        """That replay a call."""
        words = f"python benchmarks/fuzz.py --seed {self.seed} --case {case}"
        subject = f"--op {self.subject.op} --against {self.subject.against}"
        path = f"--implementation {self.subject.implementation}"
        return f"{words} --sets {self.sets} {subject} {path}"

    def __call__(self) -> bool:
        """Whether all went well."""
        numbers = range(min(self.sets, self.cases))
        for number, future in ahead(
            self.compiling, self.compile, numbers, COMPILED_AHEAD
        ):
            begun = time.perf_counter()
            try:
                shapes, update = future.result()
            except Exception as error:
                shapes = self.subject.shapes(self.seed, number)
                self.fail(number, shapes, error)
                continue
            cases = range(number, self.cases, self.sets)
            self.rows.append(self.run_set(number, shapes, update, cases))
            self.rows[-1]["seconds"] = round(time.perf_counter() - begun, 3)
            self.write()
            self.report(number)
            if len(self.failures) >= MOST_FAILURES:
                console.print(f"stopped after {len(self.failures)} failures")
                break
        for pool in (self.drawing, self.compiling):
            pool.shutdown(cancel_futures=True)
        absent = [row["number"] for row in self.rows if "absent" in row]
        if absent:
            console.print(f"vLLM's kernel did not run on the shapes {absent}")
        return self.done > 0 and not self.failures and not absent

    def run_set(self, number, shapes, update, cases) -> dict[str, Any]:
        draw = functools.partial(self.subject.draw, shapes, self.seed)
        worst: dict[str, dict[str, float]] = {}
        counts = collections.Counter()
        absent = {}
        for case, drawn in ahead(self.drawing, draw, cases, AHEAD):
            try:
                found = self.check(case, shapes, update, drawn.result())
            except Unavailable as reason:
                absent = {"absent": str(reason)}
                break
            counts["calls"] += 1
            for what, each in found.items():
                most = worst.setdefault(what, dict(rms=0.0, worst=0.0))
                if each.carried >= testing.MANY:
                    most["rms"] = max(most["rms"], each.rms)
                most["worst"] = max(most["worst"], each.worst)
            if len(self.failures) >= MOST_FAILURES:
                break
        self.done += counts["calls"]
        words = dataclasses.asdict(shapes)
        return {"number": number, **words, **counts, "errors": worst, **absent}

    def check(self, case, shapes, update, drawn) -> Found:
        try:
            return self.subject.check(update, shapes, drawn)
        except Unavailable:
            raise
        except Exception as error:
            self.fail(case, shapes, error)
            return {}

    def fail(self, case: int, shapes: Any, error: Exception) -> None:
        reason = str(error)
        if not isinstance(error, Wrong):
            traceback.print_exception(error)
            reason = f"{type(error).__name__}: {reason}"[:2000]
        self.failures.append({"case": case, "reason": reason, "to": self.words(case)})
        console.print(f"FAILED case {case}: {reason}\n  {shapes}\n  {self.words(case)}")

    def report(self, number: int) -> None:
        seconds = time.perf_counter() - self.begun
        row = self.rows[-1]
        row = row.get("of", {}) | row
        errors = ", ".join(
            f"{what} {each['rms']:.1e} {each['worst']:.2f}"
            for what, each in row["errors"].items()
        )
        kinds = [str(row[name]) for name in ("tokens", "slots") if name in row]
        names = [name for name in ("N", "rows", "H", "HV", "K", "V") if name in row]
        sizes = " ".join([*kinds, *(f"{name}={row[name]}" for name in names)])
        console.print(
            f"{seconds:6.1f} s  set {number:2}  {self.done:6} calls  "
            f"{len(self.failures)} failed  {row['seconds']:5.1f} s  "
            f"{sizes}  {errors}{row.get('absent', '')}",
            highlight=False,
        )

    def write(self) -> None:
        subject = self.subject
        result = self.header | {
            "seed": self.seed,
            "op": subject.op,
            "against": subject.against,
            "implementation": subject.implementation,
            "tolerance": subject.tolerance,
            "asked": self.cases,
            "calls": self.done,
            "sets": len(self.rows),
            "seconds": round(time.perf_counter() - self.begun, 1),
            "failures": self.failures,
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def replay(run: Run, case: int) -> bool:
    """One call alone, and all that it is."""
    shapes, update = run.compile(case % run.sets)
    drawn = run.subject.draw(shapes, run.seed, case)
    console.print(shapes, run.subject.words(drawn))
    found = run.check(case, shapes, update, drawn)
    console.print(found or "failed")
    return not run.failures


SUBJECTS = {subject.op: subject for subject in (Calls, Replays, LayerSteps)}


def main(
    cases: int = 10_000,
    sets: int = 60,
    seed: int | None = None,
    case: int | None = None,
    op: str = "fused_update",
    against: str = "",
    implementation: str = "triton",
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    if op not in SUBJECTS:
        raise SystemExit(f"--op must be one of {', '.join(SUBJECTS)}; got {op}")
    if implementation == "triton" and jax.default_backend() != "gpu":
        raise SystemExit(
            f"The kernel needs a GPU; JAX's default backend here is "
            f"{jax.default_backend()!r}. Take --implementation interpret or xla."
        )
    if quick:
        cases, sets = 40, 4
    seed = secrets.randbelow(2**31) if seed is None else seed
    known = SUBJECTS[op].known
    against = against or known[0]
    if against not in known:
        raise SystemExit(f"--against must be one of {', '.join(known)}; got {against}")
    subject = SUBJECTS[op](against, implementation)
    folder = results_folder(jax.devices()[0].device_kind, out, quick=quick)
    name = "fuzz" if against == "vllm" else f"fuzz_{op}"
    path = folder / f"{name}.json"
    run = Run(subject, seed=seed, cases=cases, sets=sets, path=path)
    console.print(
        f"seed {seed}, {cases} cases of {op} over {sets} shapes, against {against}"
    )
    if case is not None:
        well = replay(run, case)
    else:
        well = run()
        console.print(f"wrote {path}")
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
