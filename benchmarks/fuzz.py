"""Random calls of our kernel against vLLM's: python benchmarks/fuzz.py [--quick]

10,000 calls over 60 compiled shapes, all drawn from a seed that is printed; a call that
fails is printed with the words that replay it alone. `--against oracle` compares with
float64 instead, on any machine: `--implementation interpret` or `xla` without a GPU.
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
import numpy as np
import typer
from common import RESULTS, console, header
from peers import Unavailable
from peers.vllm_drawn import tensor, view, vllm_update

import gdn_jax
from gdn_jax import testing
from gdn_jax.testing import draws

INPUTS = (
    "normal v, b; q, k of size 0.01, 1 or 30 (at times one of zeros), a 1, 5 or 40, "
    "state 0.1, 1 or 10; A in [0.5, 8]; NaN wherever nothing may be read"
)
TOLERANCE = (
    "relative RMS error below twice that of gdn_jax.testing.TOLERANCE, once for each "
    "kernel, and what log(1 + exp(x)) in vLLM's loses of a row's decays, 2^-24 A a "
    "token; and of every value that of the last place twice and "
    f"{testing.FLOOR} of the values' size"
)
TOLERANCE_TO_ORACLE = (
    "relative RMS error below gdn_jax.testing.TOLERANCE; and of every value half of "
    f"the last place and {testing.FLOOR} of the values' size"
)
MOST_FAILURES = 20
AHEAD = 48  # calls drawn while others run
COMPILED_AHEAD = 4

Found = dict[str, testing.Deviation]


class Wrong(Exception):
    """A result that is; says which and by how much."""


def check(
    shapes: draws.Shapes,
    drawn: draws.Drawn,
    got: tuple[Any, Any],
    want: tuple[Any, Any],
    before: Any,
    take: Callable[[Any, np.ndarray], Any],
    equal_bits: Callable[[Any, Any], bool],
    roundings: int,
    more: float = 0.0,
) -> Found:
    """Of arrays of NumPy or torch: what the call had to write, in the tolerance; zeros
    where no live row is; all other slots by their bits."""
    live, written = drawn.live, drawn.written(shapes)
    found = {}
    dtypes = dict(state=shapes.state_dtype, out=shapes.act_dtype)
    for what, mine, other, where in (
        ("state", got[0], want[0], written),
        ("out", got[1], want[1], live),
    ):
        if where.any():
            pair = take(mine, where), take(other, where)
            found[what] = testing.deviation(*pair, dtypes[what], roundings)
            if not found[what].is_within(what, dtypes[what], roundings, more):
                raise Wrong(f"{what} deviates: {found[what]}")
    if not live.all() and bool((take(got[1], ~live) != 0).any()):
        raise Wrong("out of tokens of no live row is not zero")
    if not written.all():
        rest = take(got[0], ~written, exact=False)
        if shapes.per_token_states:
            if bool((rest != 0).any()):
                raise Wrong("states of tokens of no live row are not zero")
        elif not equal_bits(rest, take(before, ~written, exact=False)):
            raise Wrong("a slot that no row writes has other bits than before")
    return found


def take_numpy(x: np.ndarray, where: np.ndarray, exact: bool = True) -> np.ndarray:
    return x[where].astype(np.float64) if exact else x[where]


def equal_bits_numpy(x: np.ndarray, y: np.ndarray) -> bool:
    return x.tobytes() == y.tobytes()


def take_torch(x: Any, where: np.ndarray, exact: bool = True) -> Any:
    import torch

    rows = x.index_select(0, torch.from_numpy(np.flatnonzero(where)).to(x.device))
    return rows.double() if exact else rows


def equal_bits_torch(x: Any, y: Any) -> bool:
    import torch

    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def packed(shapes: draws.Shapes, state: Any, out: Any) -> tuple[Any, Any]:
    """Without the axis of rows, where tokens are dense."""
    if shapes.tokens != "dense":
        return state, out
    if shapes.per_token_states:
        state = state.reshape(-1, *state.shape[2:])
    return state, out.reshape(-1, *out.shape[2:])


def against_vllm(update: Callable, shapes: draws.Shapes, drawn: draws.Drawn) -> Found:
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    before = tensor(drawn.args[0], device)
    want = vllm_update(shapes, drawn, before)
    args, tables = jax.device_put((drawn.args, drawn.tables))
    got = map(view, packed(shapes, *update(args, tables)))
    compare = take_torch, equal_bits_torch
    return check(
        shapes,
        drawn,
        tuple(got),
        want,
        before,
        *compare,
        roundings=2,
        more=lost_by_vllm(shapes, drawn),
    )


def lost_by_vllm(shapes: draws.Shapes, drawn: draws.Drawn) -> float:
    """Its softplus is log(1 + exp(x)), where 1 + exp(x) is rounded: half a last place
    of 1, times A in a token's decay; for x < -17 it is 0, which loses less."""
    A = float(np.exp(np.asarray(drawn.args[4], np.float64)).max())
    beta = shapes.statics.get("softplus_beta", 1.0)
    return int(drawn.length.max()) * A / beta * 2.0**-24


def against_oracle(update: Callable, shapes: draws.Shapes, drawn: draws.Drawn) -> Found:
    state, out, _ = testing.oracle(drawn.args, drawn.tables | shapes.statics)
    want = packed(shapes, state, out)
    args, tables = jax.device_put((drawn.args, drawn.tables))
    got = map(np.asarray, packed(shapes, *update(args, tables)))
    compare = take_numpy, equal_bits_numpy
    return check(shapes, drawn, tuple(got), want, drawn.args[0], *compare, roundings=1)


CHECKS = {"vllm": against_vllm, "oracle": against_oracle}


def compiled(shapes: draws.Shapes, seed: int, implementation: str) -> Callable:
    """Our op on calls of these shapes, the pool donated."""

    def update(args, tables):
        return gdn_jax.fused_update(
            *args, **tables, **shapes.statics, implementation=implementation
        )

    def donating(state, rest, tables):
        return update((state, *rest), tables)

    drawn = draws.draw(shapes, seed, 0)
    state, *rest = drawn.args
    call = (
        jax.jit(donating, donate_argnums=() if shapes.per_token_states else 0)
        .lower(state, tuple(rest), drawn.tables)
        .compile()
    )
    return lambda args, tables: call(args[0], tuple(args[1:]), tables)


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

    def __init__(self, *, seed, cases, sets, against, implementation, path):
        self.seed, self.cases, self.sets = seed, cases, sets
        self.against, self.implementation, self.path = against, implementation, path
        self.begun, self.done = time.perf_counter(), 0
        self.failures: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.header = header(INPUTS)
        del self.header["time"]
        pool = concurrent.futures.ThreadPoolExecutor
        self.drawing = pool(min(8, os.cpu_count() or 1))
        self.compiling = pool(COMPILED_AHEAD)

    def shapes(self, number: int) -> draws.Shapes:
        shared = self.against == "vllm"
        return draws.draw_shapes(self.seed, number, shared=shared)

    def compile(self, number: int) -> tuple[draws.Shapes, Callable]:
        shapes = self.shapes(number)
        return shapes, compiled(shapes, self.seed, self.implementation)

    def words(self, case: int) -> str:
        """That replay a call."""
        words = f"python benchmarks/fuzz.py --seed {self.seed} --case {case}"
        return f"{words} --sets {self.sets} --against {self.against}"

    def __call__(self) -> bool:
        """Whether all went well."""
        numbers = range(min(self.sets, self.cases))
        for number, future in ahead(
            self.compiling, self.compile, numbers, COMPILED_AHEAD
        ):
            begun = time.perf_counter()
            shapes, update = future.result()
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
        draw = functools.partial(draws.draw, shapes, self.seed)
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
            counts["live_rows"] += int((drawn.result().read >= 0).sum())
            for what, each in found.items():
                most = worst.setdefault(what, dict(rms=0.0, worst=0.0))
                if each.carried >= testing.MANY:
                    most["rms"] = max(most["rms"], each.rms)
                most["worst"] = max(most["worst"], each.worst)
            if len(self.failures) >= MOST_FAILURES:
                break
        self.done += counts["calls"]
        words = dataclasses.asdict(shapes) | {"options": shapes.statics}
        return {"number": number, **words, **counts, "errors": worst, **absent}

    def check(self, case, shapes, update, drawn) -> Found:
        try:
            return CHECKS[self.against](update, shapes, drawn)
        except Unavailable:
            raise
        except Wrong as wrong:
            reason = str(wrong)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"[:2000]
        self.failures.append({"case": case, "reason": reason, "to": self.words(case)})
        console.print(f"FAILED case {case}: {reason}\n  {shapes}\n  {self.words(case)}")
        return {}

    def report(self, number: int) -> None:
        seconds = time.perf_counter() - self.begun
        row = self.rows[-1]
        errors = ", ".join(
            f"{what} {each['rms']:.1e} {each['worst']:.2f}"
            for what, each in row["errors"].items()
        )
        console.print(
            f"{seconds:6.1f} s  set {number:2}  {self.done:6} calls  "
            f"{len(self.failures)} failed  {row['seconds']:5.1f} s  {row['tokens']} "
            f"{row['slots']} N={row['N']} H={row['H']} HV={row['HV']} K={row['K']} "
            f"V={row['V']}  {errors}{row.get('absent', '')}",
            highlight=False,
        )

    def write(self) -> None:
        to_oracle = self.against == "oracle"
        result = self.header | {
            "seed": self.seed,
            "against": self.against,
            "implementation": self.implementation,
            "tolerance": TOLERANCE_TO_ORACLE if to_oracle else TOLERANCE,
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
    drawn = draws.draw(shapes, run.seed, case)
    console.print(shapes)
    console.print(
        dict(
            drawn.tables,
            begin=drawn.begin,
            length=drawn.length,
            read=drawn.read,
            write=drawn.write,
        )
    )
    found = run.check(case, shapes, update, drawn)
    console.print(found or "failed")
    return not run.failures


def main(
    cases: int = 10_000,
    sets: int = 60,
    seed: int | None = None,
    case: int | None = None,
    against: str = "vllm",
    implementation: str = "triton",
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    if against not in CHECKS:
        raise SystemExit(f"--against must be one of {', '.join(CHECKS)}; got {against}")
    if implementation == "triton" and jax.default_backend() != "gpu":
        raise SystemExit(
            f"The kernel needs a GPU; JAX's default backend here is "
            f"{jax.default_backend()!r}. Take --implementation interpret or xla."
        )
    if quick:
        cases, sets = 40, 4
    seed = secrets.randbelow(2**31) if seed is None else seed
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    folder = out or RESULTS / device
    folder.mkdir(parents=True, exist_ok=True)
    name = "fuzz" if against == "vllm" else f"fuzz_{against}"
    run = Run(
        seed=seed,
        cases=cases,
        sets=sets,
        against=against,
        implementation=implementation,
        path=folder / f"{name}.json",
    )
    console.print(f"seed {seed}, {cases} calls over {sets} shapes, against {against}")
    well = replay(run, case) if case is not None else run()
    if case is None:
        console.print(f"wrote {run.path}")
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
