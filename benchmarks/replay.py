"""Replay, beside states that are written: python benchmarks/replay.py [--tokens 4]

Steps of `replay_update` one after another, each row at its own place of its ring: what
is told is the mean of a step, folds included. Beside it peers that do the same, and
what writes states: one in place (T = 1), or a checkpoint a token, ours and the peers',
and a copy.
"""

import dataclasses
import enum
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import typer
import update
from common import (
    commit_of,
    console,
    header,
    need_gpu,
    passed,
    results_folder,
    rows_besides,
    time_contender,
    wait,
)
from peers import replay as replay_peers
from replay_steps import (
    STEPS,
    Inputs,
    Problem,
    Step,
    compile_step,
    make_inputs,
    make_step,
    slots_of,
    steps_of,
)
from rich.progress import track
from rich.table import Table

from gdn_jax import ReplayConfig, testing, timing

COMPILERS = 16
CHECKED_ROWS = 8
CHECKED_STEPS = 40  # more than two rings, whatever stands
PEER_TOLERANCE = 2e-2  # they round the state, or u, to bfloat16 where they use it
OURS = "prepare_kernel", "meet_kernel"
ACCEPTS = ("uniform", "all", "one")
INPUTS = (
    update.INPUTS + "; of a step's tokens 1 to T are accepted, uniformly (seed 0), or "
    "all, or one; rings begin anywhere (the peers' at their first column), with 0 to "
    "R - T records that are committed, and T pending"
)
ACCEPTS_TOKENS = 4, 8  # of problems that are measured with every way of accepting
ROWS_PLAIN, ROWS_VERIFY = (8, 64, 256), (8, 64, 128)
ROWS = sorted({*ROWS_PLAIN, *ROWS_VERIFY})
TUNED = {
    "meet": [
        *itertools.product((16,), (32, 64), (4, 8), (1,), (2, 3)),
        *itertools.product((16,), (128,), (4, 8), (1,), (3,)),
        (16, 64, 2, 1, 3),
        (32, 32, 4, 1, 2),
        (32, 64, 4, 2, 2),
    ],
    "prepare": [*itertools.product((64, 128), (1, 2)), (16, 1), (32, 1), (128, 4)],
}


class Kernel(enum.StrEnum):
    """Each of the two is tuned by itself: one's time is not the other's."""

    meet = enum.auto()
    prepare = enum.auto()

    def configs(self) -> list[ReplayConfig]:
        launches = TUNED[self]
        if self is Kernel.meet:
            return [ReplayConfig(*launch) for launch in launches]
        names = "prepare_k", "prepare_warps"
        return [ReplayConfig(**dict(zip(names, x, strict=True))) for x in launches]


def check(problem: Problem, step: Step) -> dict[str, float]:
    """The largest errors against the reference, of some rows in some steps."""
    errors = {"state": jnp.zeros(()), "out": jnp.zeros(())}
    inputs, rows = make_inputs(problem), min(CHECKED_ROWS, problem.N)
    few = inputs.first(rows)
    every = CHECKED_STEPS * problem.groups
    ours = itertools.islice(steps_of(inputs, step), 0, every, problem.groups)
    reference = steps_of(few, make_step(implementation="reference"))
    for (state, out), (want_state, want) in zip(ours, reference, strict=False):
        state = slots_of(state, rows)
        pairs = {
            "state": (state.to_dense(), want_state.to_dense()),
            "out": (out[:rows], want),
        }
        for name, pair in pairs.items():
            errors[name] = jnp.maximum(relative_error(*pair), errors[name])
    return {name: float(error) for name, error in errors.items()}


@jax.jit
def relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    """On the device, where float32 is enough for a norm."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def worse(error: float, than: float) -> float:
    """Of two errors; NaN is the worst."""
    return float(np.maximum(error, than))


def tolerance(problem: Problem, what: str) -> float:
    """The kernel's products are of bfloat16 parts, as those of chunks are."""
    dtype = {"state": problem.state_dtype, "out": "bfloat16"}[what]
    return testing.TOLERANCE[f"chunked {what}", dtype]


Compiled = dict[tuple[Problem, ReplayConfig | None], Future]


def begin_compiling(
    problems: list[Problem], configs: list[Any], pool: ThreadPoolExecutor
) -> Compiled:
    """All at once, since one after another would take most of the time."""
    return {
        (problem, config): pool.submit(compile_step, problem, config)
        for problem in problems
        for config in configs
    }


def measure(
    problem: Problem, config: ReplayConfig | None, compiled: Compiled
) -> dict[str, Any]:
    row = {"contender": "replay", **dataclasses.asdict(problem)}
    row["config"] = None if config is None else dataclasses.asdict(config)
    step = compiled[problem, config].result()
    errors = row["errors"] = check(problem, step)
    if not passed(functools.partial(tolerance, problem), errors):
        return row | {"absent": "errors above the tolerance"}
    steps = steps_of(make_inputs(problem), step)
    next(steps)
    found = time_steps(problem, lambda: next(steps), lambda name: True)
    launches = {name: count for name, (_, count) in found["kernels"].items()}
    if launches != dict.fromkeys(OURS, 1.0):
        raise RuntimeError(f"a step is to be one launch of each of {OURS}: {launches}")
    return row | found


def time_steps(
    problem: Problem, step: Callable[[], Any], belongs: Callable[[str], bool]
) -> dict[str, Any]:
    steps = STEPS * problem.groups
    wait()
    with timing.record() as kernels:
        for _ in range(steps):
            step()
        wait()
    per_step: dict[str, list[float]] = {}
    for kernel in kernels:
        if belongs(kernel.name):
            per_step.setdefault(kernel.name, []).append(kernel.duration_us)
    if not per_step:
        raise RuntimeError("no kernel of the contender ran")
    return {
        "mean_us": sum(map(sum, per_step.values())) / steps,
        "kernels": {
            name: [statistics.mean(us), len(us) / steps]
            for name, us in per_step.items()
        },
    }


def peer_inputs(inputs: Inputs, committed: np.ndarray) -> dict[str, Any]:
    return dict(
        state=inputs.state.checkpoint,
        tables=list(inputs.tables),
        sets=inputs.sets,
        accepted=np.asarray(inputs.accepted),
        committed=committed,
    )


def check_peer(problem: Problem, build: Callable[..., peers.Call]) -> float:
    """The largest error of its out in some steps from states without records."""
    small = dataclasses.replace(problem, N=CHECKED_ROWS, turns=1)
    inputs = make_inputs(small)
    none = jnp.zeros(CHECKED_ROWS, jnp.int32)
    call = build(small, peer_inputs(inputs, np.asarray(none)))
    # an array each, since a step is given all of them to keep
    counters = dict(start=none, committed=none.copy(), pending=none.copy())
    inputs = inputs._replace(state=inputs.state._replace(**counters))
    reference = steps_of(inputs, make_step(implementation="reference"))
    error = 0.0
    for i, (_, want) in zip(range(CHECKED_STEPS), reference, strict=False):
        call.run(i)
        error = worse(testing.relative_error(call.result()["out"], want), error)
    return error


def measure_peer(
    problem: Problem, name: str, build: Callable[..., peers.Call]
) -> dict[str, Any]:
    row = {"contender": name, **dataclasses.asdict(problem)}
    try:
        row["errors"] = {"out": check_peer(problem, build)}
        if not row["errors"]["out"] < PEER_TOLERANCE:
            return row | {"absent": "errors above the tolerance"}
        inputs = make_inputs(problem)
        # they know no pending records: those of ours that stand are committed
        stand = np.tile(inputs.accepted[0], problem.groups)
        committed = np.asarray(inputs.state.committed) + stand
        call = build(problem, peer_inputs(inputs, committed))
        row["note"] = call.note
        steps = itertools.count()
        call.run(next(steps))
        return row | time_steps(problem, lambda: call.run(next(steps)), call.kernels)
    except peers.Unavailable as reason:
        return row | {"absent": str(reason)}
    except Exception as error:  # nothing that a peer does ends the run
        return row | {"absent": f"failed: {type(error).__name__}: {error}"[:400]}


def others(problem: Problem, alone: bool) -> list[dict[str, Any]]:
    """What writes states, ours alone or the peers' too; a median, since all steps are
    alike."""
    suite = update.suite("decode" if problem.T == 1 else "verify")
    inputs = suite.make_inputs(problem.others)
    expected = suite.expect(problem.others, inputs)
    names = ["triton"]
    if not alone:
        names = ["copy", *names, *suite.peers(problem.others)]
    return [
        time_contender(suite, name, problem.others, inputs, expected) for name in names
    ]


def problems_of(
    state_dtypes: list[str], tokens: list[int], rows: list[int], quick: bool
) -> list[Problem]:
    problems = []
    for dtype, T in itertools.product(state_dtypes, tokens):
        of_tokens = ROWS_PLAIN if T == 1 else ROWS_VERIFY
        for N in of_tokens[-1:] if quick else of_tokens:
            every_way = of_tokens[-1] == N and T in ACCEPTS_TOKENS and not quick
            ways = ACCEPTS if every_way else ACCEPTS[:1]
            if N in rows:
                problems += [Problem(N, T, dtype, accepts) for accepts in ways]
    return problems


def main(
    state_dtype: list[str] = typer.Option(["float32", "bfloat16"]),  # noqa: B008
    tokens: list[int] = typer.Option([1, 4, 8]),  # noqa: B008
    rows: list[int] = typer.Option(ROWS),  # noqa: B008
    tune: Kernel | None = None,
    quick: bool = False,
    alone: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """state_dtype, tokens, rows: what is measured; the results file keeps other rows.
    tune: a kernel's launches in TUNED. quick: the largest N. alone: no peers."""
    need_gpu()
    result = header(INPUTS)
    result["time"] = f"device kernels, mean of {STEPS} steps; of others the median"
    result["copy_tb_per_s"] = timing.copy_bandwidth()
    committed = results_folder(result["device"])
    folder = results_folder(result["device"], out, quick=quick)
    file = f"replay_tune_{tune}.json" if tune else "replay.json"
    path = folder / file
    problems = problems_of(state_dtype, tokens, rows, quick)
    if not problems:
        raise SystemExit(
            f"no problem has --rows {rows} and --tokens {tokens}: one token is for "
            f"{ROWS_PLAIN} rows, more are for {ROWS_VERIFY}; with --quick for the most."
        )
    keys = "state_dtype", "T", "N"
    measured = [{key: getattr(problem, key) for key in keys} for problem in problems]
    result["rows"] = rows_besides(measured, path, committed / file)
    configs = tune.configs() if tune else [None]
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = begin_compiling(problems, configs, pool)
    for problem in track(problems, description="replay", console=console):
        found = [measure(problem, config, compiled) for config in configs]
        if not (tune or alone):
            same = replay_peers.DECODE if problem.T == 1 else replay_peers.VERIFY
            found += [measure_peer(problem, *peer) for peer in same.items()]
            if problem.accepts == "uniform":
                found += others(problem, alone=False)
        console.print(table(problem, found))
        result["rows"] += [commit_of(result) | row for row in found]
        path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {path}")


def table(problem: Problem, rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        *("contender", "us", "state error", "out error", "launch or why absent"),
        title=f"N={problem.N} T={problem.T} state {problem.state_dtype} accepted: "
        f"{problem.accepts}",
        title_justify="left",
    )
    for row in rows:
        us = row.get("mean_us", row.get("median_us"))
        errors = row.get("errors", {})
        shown.add_row(
            row["contender"],
            "" if us is None else f"{us:.1f}",
            *(
                f"{errors[name]:.1e}" if name in errors else ""
                for name in ("state", "out")
            ),
            str(row.get("absent", row.get("config") or "")),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
