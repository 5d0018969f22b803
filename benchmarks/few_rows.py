"""Products of few rows: python benchmarks/few_rows.py [--quick] [--tune]

The products of a decoding step of Qwen3.5-9B and of the dense ones of Qwen3-Next, whose
time is that of reading the matrices; with --tune by other launches too. Every call has
matrices of its own, of four times the L2 cache together.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import peers
import typer
from common import L2_BYTES, Expected, Suite

from gdn_jax import testing
from gdn_jax.ops.blocks import padded
from gdn_jax.ops.few_rows import tuning
from gdn_jax.ops.few_rows.api import products
from gdn_jax.ops.few_rows.tuning import FewRowsConfig

INPUTS = "normal x and matrices"
ROWS = (1, 8, 32, 64)
SHARED_KB = 227  # of an H200's SM
SUMS_OF_A_LANE = 128  # more would spill
TOLERANCES = {False: 1, True: 3}  # roundings, of gate, up and their product


@dataclasses.dataclass(frozen=True)
class Problem:
    """L rows by matrices [D, F]; `gated`, silu of the first product by the second."""

    name: str
    L: int
    D: int
    columns: tuple[int, ...]
    gated: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}: L={self.L} D={self.D} F={self.columns}"

    @property
    def moved_bytes(self) -> int:
        """Least traffic of a call: matrices, x and y."""
        out = self.columns[: 1 if self.gated else None]
        return 2 * (self.D * (sum(self.columns) + self.L) + self.L * sum(out))

    @property
    def num_sets(self) -> int:
        return max(2, -(-4 * L2_BYTES // self.moved_bytes))


KINDS = {
    "9B q k v z a b": (4096, (8192, 4096, 32, 32)),
    "9B out": (4096, (4096,)),
    "9B gate up": (4096, (12288, 12288), True),
    "9B down": (12288, (4096,)),
    "9B attention": (4096, (8192, 1024, 1024)),
    "Next qkvz ba": (2048, (12288, 64)),
    "Next out": (4096, (2048,)),
}


def problems(quick: bool = False, tune: bool = False) -> list[Problem]:
    rows = (8,) if quick else (8, 64) if tune else ROWS
    return [Problem(name, L, *kind) for name, kind in KINDS.items() for L in rows]


def make_inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, scale):
        return scale * jax.random.normal(key, shape, jnp.bfloat16)

    key = jax.random.key(seed, impl="unsafe_rbg")
    shapes = [(problem.D, F) for F in problem.columns]
    sets = []
    for number in range(problem.num_sets):
        keys = jax.random.split(jax.random.fold_in(key, number), 1 + len(shapes))
        x = normal(keys[0], (problem.L, problem.D), 1.0)
        scale = problem.D**-0.5
        drawn = zip(keys[1:], shapes, strict=True)
        sets.append((x, [normal(key, shape, scale) for key, shape in drawn]))
    return {"sets": sets}


def multiply(problem: Problem, inputs: Mapping[str, Any], **options) -> peers.Call:
    step = jax.jit(functools.partial(products, gated=problem.gated, **options))
    sets, held = inputs["sets"], {}

    def run(i):
        held["out"] = step(*sets[i % len(sets)])

    def result():
        return {
            "out": np.concatenate([np.asarray(y, np.float32) for y in held["out"]], 1)
        }

    return peers.Call(run, result, lambda name: True, "")


def expect(problem: Problem, inputs: Mapping[str, Any]) -> dict[str, Expected]:
    x, matrices = inputs["sets"][0]
    with jax.default_matmul_precision("highest"):
        ys = [jnp.dot(x.astype(jnp.float32), m.astype(jnp.float32)) for m in matrices]
    if problem.gated:
        ys = [jax.nn.silu(ys[0]) * ys[1]]
    return {"out": Expected(..., np.concatenate([np.asarray(y) for y in ys], axis=1))}


def tolerance(problem: Problem, what: str, *, is_ours: bool) -> float:
    del is_ours
    return TOLERANCES[problem.gated] * testing.TOLERANCE[what, "bfloat16"]


# block_f, block_d, num_warps, num_stages: columns of 64 bytes to 512, 8 to 32 KB a step
LAUNCHES = (
    (64, 128, 4, 4),
    (64, 128, 4, 3),
    (64, 64, 4, 6),
    (64, 256, 4, 3),
    (128, 64, 4, 4),
    (128, 64, 4, 5),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (32, 128, 4, 5),
    (256, 64, 8, 4),
    (64, 64, 8, 5),
    (64, 128, 8, 3),
)


def candidates(problem: Problem) -> list[FewRowsConfig]:
    """Each launch with as many parts as fill the GPU once and twice."""
    found = []
    for block_f, block_d, num_warps, num_stages in LAUNCHES:
        if problem.gated:
            block_f = max(16, block_f // 2)
        columns = problem.columns[: 1 if problem.gated else None]
        tiles = sum(-(-F // block_f) for F in columns)
        once = 1
        while not problem.gated and once < 8 and tiles * once < 90:
            once *= 2
        for splits in (once,) if problem.gated or once == 8 else (once, 2 * once):
            config = FewRowsConfig(block_f, block_d, splits, num_warps, num_stages)
            if is_possible(config, problem):
                found.append(config)
    return found


def is_possible(config: FewRowsConfig, problem: Problem) -> bool:
    columns = config.block_f * (2 if problem.gated else 1)
    needed = tuning.shared_memory(config, problem.L, gated=problem.gated)
    return (
        needed <= SHARED_KB
        and padded(problem.L) * columns <= SUMS_OF_A_LANE * 32 * config.num_warps
    )


def contenders(problem: Problem, *, tune: bool) -> dict[str, common.Build]:
    triton = functools.partial(multiply, implementation="triton")
    found = {"triton": triton, "xla": functools.partial(multiply, implementation="xla")}
    for config in candidates(problem) if tune else []:
        fields = dataclasses.asdict(config).items()
        name = " ".join(f"{field}={value}" for field, value in fields)
        found[f"triton {name}"] = functools.partial(triton, config=config)
    return found


def suite(*, tune: bool) -> Suite:
    return Suite(
        name="few_rows",
        inputs=INPUTS,
        make_inputs=make_inputs,
        expect=expect,
        tolerance=tolerance,
        ours=functools.partial(contenders, tune=tune),
        peers=lambda problem: {},
    )


def main(
    quick: bool = False, tune: bool = False, out: pathlib.Path | None = None
) -> None:
    common.run_suite(suite(tune=tune), problems(quick, tune), out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
