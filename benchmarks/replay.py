"""Replay, beside states that are written: python benchmarks/replay.py [--tune]

Steps of `replay_update` one after another, each row at its own place of its ring: what
is told is the mean of a step, folds included. Beside it peers that do the same, and
what writes states: one in place (T = 1), or a checkpoint a token, ours and the peers',
and a copy.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import peers
import typer
import update
from common import (
    RESULTS,
    console,
    header,
    need_gpu,
    passed,
    time_contender,
    wait,
)
from peers import replay as replay_peers
from replay_steps import (
    STEPS,
    Problem,
    Step,
    checked,
    compile_step,
    make_accepted,
    make_state,
    make_step,
    make_tables,
    make_tokens,
    steps_of,
)
from rich.progress import track
from rich.table import Table

from gdn_jax import ReplayConfig, testing, timing

COMPILERS = 16
CHECKED_STEPS = 40  # more than two rings, whatever stands
PEER_TOLERANCE = 2e-2  # they round the state, or u, to bfloat16 where they use it
OURS = "prepare_kernel", "meet_kernel"
ACCEPTS = ("uniform", "all", "one")
INPUTS = (
    update.INPUTS + "; of a step's tokens 1 to T are accepted, uniformly (seed 0), or "
    "all, or one; rings begin anywhere (the peers' at their first column), with 0 to "
    "R - T records that are committed, and T pending"
)
LAUNCHES = [
    *itertools.product((16,), (32, 64, 128), (4, 8), (1,), (2, 3)),
    *itertools.product((32,), (32, 64), (2, 4), (1,), (2, 3)),
    *itertools.product((32,), (32, 64), (2, 4), (2,), (2,)),
]
# the second kernel's launches, then the first's: one's time is not the other's
CONFIGS = [ReplayConfig(*launch) for launch in LAUNCHES]
CONFIGS += [ReplayConfig(prepare_k=size) for size in (32, 64, 128)]


def check(problem: Problem, step: Step) -> dict[str, float]:
    """The largest errors against the reference in some steps of `checked(problem)`."""
    errors = {"state": 0.0, "out": 0.0}
    ours, reference = (
        itertools.islice(steps_of(checked(problem), each), CHECKED_STEPS)
        for each in (step, make_step(implementation="reference"))
    )
    for (state, out), (want_state, want) in zip(ours, reference, strict=True):
        pairs = {
            "state": (state.to_dense(), want_state.to_dense()),
            "out": (out, want),
        }
        for name, pair in pairs.items():
            errors[name] = worse(testing.relative_error(*pair), errors[name])
    return errors


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
    wanted = dict.fromkeys([*problems, *map(checked, problems)])
    return {
        (problem, config): pool.submit(compile_step, problem, config)
        for problem in wanted
        for config in configs
    }


def measure(
    problem: Problem, config: ReplayConfig | None, compiled: Compiled
) -> dict[str, Any]:
    row = {"contender": "replay", **dataclasses.asdict(problem)}
    row["config"] = None if config is None else dataclasses.asdict(config)
    errors = check(problem, compiled[checked(problem), config].result())
    row["errors"] = errors
    if not passed(functools.partial(tolerance, problem), errors):
        return row | {"absent": "errors above the tolerance"}
    steps = steps_of(problem, compiled[problem, config].result())
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


def peer_inputs(problem: Problem, committed: np.ndarray) -> dict[str, Any]:
    return dict(
        state=make_state(problem).checkpoint,
        tables=list(make_tables(problem)),
        sets=make_tokens(problem),
        accepted=make_accepted(problem),
        committed=committed,
    )


def check_peer(problem: Problem, build: Callable[..., peers.Call]) -> float:
    """The largest error of its out in some steps from states without records."""
    small = checked(problem)
    made = make_state(small)
    none = jnp.zeros_like(made.committed)
    start = made._replace(start=none, committed=none, pending=none)
    steps = steps_of(small, make_step(implementation="reference"), start)
    call = build(small, peer_inputs(small, np.zeros(len(none), np.int32)))
    error = 0.0
    for i in range(CHECKED_STEPS):
        call.run(i)
        _, want = next(steps)
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
        # they know no pending records: those of ours that stand are committed
        committed = np.asarray(make_state(problem).committed)
        committed = committed + np.tile(make_accepted(problem)[0], problem.groups)
        call = build(problem, peer_inputs(problem, committed))
        row["note"] = call.note
        steps = itertools.count()
        call.run(next(steps))
        return row | time_steps(problem, lambda: call.run(next(steps)), call.kernels)
    except peers.Unavailable as reason:
        return row | {"absent": str(reason)}
    except Exception as error:  # nothing that a peer does ends the run
        return row | {"absent": f"failed: {type(error).__name__}: {error}"[:400]}


def others(problem: Problem) -> list[dict[str, Any]]:
    """What writes states; a median, since all steps are alike."""
    suite = update.suite("decode" if problem.T == 1 else "verify")
    inputs = suite.make_inputs(problem.others)
    expected = suite.expect(problem.others, inputs)
    names = "copy", "triton", *suite.peers(problem.others)
    return [
        time_contender(suite, name, problem.others, inputs, expected) for name in names
    ]


def main(
    tune: bool = False,
    quick: bool = False,
    alone: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """tune: the launches of CONFIGS. quick: the largest N alone. alone: no peers."""
    need_gpu()
    result = header(INPUTS)
    result["time"] = f"device kernels, mean of {STEPS} steps; of others the median"
    result |= {"copy_tb_per_s": timing.copy_bandwidth(), "rows": []}
    folder = out or RESULTS / result["device"].lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    name = "replay_tune" if tune else "replay_quick" if quick else "replay"
    path = folder / f"{name}.json"
    verify = [(N, T) for T in (4, 8) for N in ((128,) if quick else (8, 64, 128))]
    plain = [(N, 1) for N in ((256,) if quick else (8, 64, 256))]
    problems = [
        Problem(N, T, dtype)
        for dtype in ("float32", "bfloat16")
        for N, T in (*verify, *plain)
    ]
    if not quick:
        problems += [
            Problem(128, 4, dtype, accepts)
            for dtype in ("float32", "bfloat16")
            for accepts in ACCEPTS[1:]
        ]
    configs = CONFIGS if tune else [None]
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = begin_compiling(problems, configs, pool)
    for problem in track(problems, description="replay", console=console):
        rows = [measure(problem, config, compiled) for config in configs]
        if not (tune or alone):
            same = replay_peers.DECODE if problem.T == 1 else replay_peers.VERIFY
            rows += [measure_peer(problem, *peer) for peer in same.items()]
        if not (tune or alone) and problem.accepts == "uniform":
            rows += others(problem)
        console.print(table(problem, rows))
        result["rows"] += rows
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
