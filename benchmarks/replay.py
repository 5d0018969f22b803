"""Replay, beside states that are written: python benchmarks/replay.py [--tune]

Steps of `replay_update` one after another, each row at its own place of its ring: what
is told is the mean of a step, folds included. Beside it what writes states: one in
place (T = 1), or a checkpoint a token, ours and the peers', and a copy.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
import update
from common import (
    L2_BYTES,
    RESULTS,
    console,
    header,
    need_gpu,
    passed,
    time_contender,
    wait,
)
from rich.progress import track
from rich.table import Table

import gdn_jax
from gdn_jax import ReplayConfig, ReplayState, testing, timing

STEPS = 64  # that are timed: every row folds a few times
SETS = 8  # of tokens, which take turns
CHECKED_ROWS = 8
ACCEPTS = ("uniform", "all", "one")
INPUTS = (
    update.INPUTS + "; of a step's tokens 1 to T are accepted, uniformly (seed 0), or "
    "all, or one; rings begin anywhere, with 0 to R - T records that are committed"
)
CONFIGS = [
    ReplayConfig(block_v, block_k, steps, warps, stages, parts)
    for (block_v, block_k, steps, warps), stages, parts in itertools.product(
        [(16, 128, 8, 1), (16, 64, 8, 1), (16, 128, 4, 1), (32, 128, 4, 2)],
        (2, 3, 4),
        (2, 3),
    )
]


@dataclasses.dataclass(frozen=True)
class Problem:
    """N rows of T tokens a step."""

    N: int
    T: int
    state_dtype: str
    accepts: str = "uniform"
    R: int = 16
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128

    @property
    def others(self) -> update.Problem:
        """What writes states is measured on."""
        sizes = self.N, self.T, self.H, self.HV, self.K, self.V
        return update.Problem(*sizes, state_dtype=self.state_dtype, dense=True)

    @property
    def groups(self) -> int:
        """Of N slots each, that take turns: more than four times the L2 cache."""
        return max(1, -(-4 * L2_BYTES // (self.others.state_bytes * self.N)))


def make_state(problem: Problem) -> ReplayState:
    p, P = problem, problem.N * problem.groups
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    k = normal(P, p.H, p.R, p.K)
    random = np.random.default_rng(1)
    return ReplayState(
        checkpoint=(0.1 * normal(P, p.HV, p.V, p.K)).astype(p.state_dtype),
        u=normal(P, p.HV, p.R, p.V),
        k=k.astype(jnp.bfloat16),
        k_scale=jax.lax.rsqrt(jnp.sum(k * k, axis=-1)),
        log_decay=-jnp.abs(normal(P, p.HV, p.R)),
        start=jnp.asarray(random.integers(0, p.R, P), jnp.int32),
        committed=jnp.asarray(random.integers(0, p.R - p.T + 1, P), jnp.int32),
        pending=jnp.full(P, p.T, jnp.int32),
    )


def make_tokens(problem: Problem) -> list[tuple[jax.Array, ...]]:
    """[N, T, ..] each, dense rows."""
    sets = []
    for seed in range(SETS):
        made = update.make_inputs(problem.others, seed)
        for name in ("q", "k", "v", "a", "b"):
            shape = problem.N, problem.T, *made[name].shape[1:]
            made[name] = made[name].reshape(shape)
        sets.append(tuple(made[name] for name in update.TOKENS))
    return sets


def make_accepted(problem: Problem) -> np.ndarray:
    """[steps, N]"""
    shape, T = (STEPS, problem.N), problem.T
    if problem.accepts == "uniform":
        drawn = np.random.default_rng(0).integers(1, T + 1, shape)
    else:
        drawn = np.full(shape, T if problem.accepts == "all" else 1)
    return drawn.astype(np.int32)


def steps_of(problem: Problem, **options: Any) -> Iterator[tuple[ReplayState, Any]]:
    """(state, out) after each step."""
    step = jax.jit(
        functools.partial(gdn_jax.replay_update, **options), donate_argnums=0
    )
    slots = jnp.arange(problem.N * problem.groups, dtype=jnp.int32)
    tables = slots.reshape(problem.groups, problem.N)
    sets, state = make_tokens(problem), make_state(problem)
    accepted = [jnp.asarray(each) for each in make_accepted(problem)]
    for i in itertools.count():
        tables_of = dict(
            slots=tables[i % problem.groups], num_accepted=accepted[i % STEPS]
        )
        state, out = step(state, *sets[i % SETS], **tables_of)
        yield state, out


def check(problem: Problem, config: ReplayConfig | None) -> dict[str, float]:
    """Errors of the first rows against the reference, after some steps."""
    small = dataclasses.replace(problem, N=CHECKED_ROWS)
    ways = dict(triton=config, reference=None)
    last = {
        name: next(
            itertools.islice(
                steps_of(small, implementation=name, config=each), 11, None
            )
        )
        for name, each in ways.items()
    }
    (state, out), (want_state, want) = last["triton"], last["reference"]
    return {
        "state": testing.relative_error(state.to_dense(), want_state.to_dense()),
        "out": testing.relative_error(out, want),
    }


def tolerance(problem: Problem, what: str) -> float:
    """The kernel's products are of bfloat16 parts, as those of chunks are."""
    dtype = {"state": problem.state_dtype, "out": "bfloat16"}[what]
    return testing.TOLERANCE[f"chunked {what}", dtype]


def measure(problem: Problem, config: ReplayConfig | None) -> dict[str, Any]:
    row = {"contender": "replay", **dataclasses.asdict(problem)}
    row["config"] = None if config is None else dataclasses.asdict(config)
    row["errors"] = errors = check(problem, config)
    if not passed(functools.partial(tolerance, problem), errors):
        return row | {"absent": "errors above the tolerance"}
    steps = steps_of(problem, implementation="triton", config=config)
    next(steps)
    wait()
    with timing.record() as kernels:
        for _ in range(STEPS):
            next(steps)
        wait()
    per_step: dict[str, list[float]] = {}
    for kernel in kernels:
        per_step.setdefault(kernel.name, []).append(kernel.duration_us)
    return row | {
        "mean_us": sum(map(sum, per_step.values())) / STEPS,
        "kernels": {
            name: [statistics.mean(us), len(us) / STEPS]
            for name, us in per_step.items()
        },
    }


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
    """tune: every launch, on a few problems. quick: N = 128 alone. alone: no peers."""
    need_gpu()
    result = header(INPUTS)
    result["time"] = f"device kernels, mean of {STEPS} steps; of others the median"
    result |= {"copy_tb_per_s": timing.copy_bandwidth(), "rows": []}
    folder = out or RESULTS / result["device"].lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("replay_tune.json" if tune else "replay.json")
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
    for problem in track(problems, description="replay", console=console):
        rows = [measure(problem, config) for config in (CONFIGS if tune else [None])]
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
