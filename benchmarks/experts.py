"""The experts' products: python benchmarks/experts.py [--quick] [--tune]

Rows by their experts' weights, of the two products of a mixture-of-experts layer each,
in the geometries of Qwen3-Next and Qwen3.5-MoE; with --tune by other launches too. TB/s
are of the weights of those experts that any token chose, and of the rows.
"""

import dataclasses
import functools
import itertools
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

from gdn_jax import GroupedDotConfig, grouped_dot, testing
from gdn_jax._triton import LANES
from gdn_jax.ops.grouped_dot import tuning

TOKENS = (1, 8, 64, 256, 4096)
INPUTS = "normal x and weights; each token's experts drawn evenly, without repeats"
CHECKED_ROWS = 64
SHARED_BYTES = 227 * 2**10  # of an H200's SM
SUMS_IN_A_LANE = 128  # more would spill
MAX_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """N tokens, k experts of E each: a product from D to F."""

    model: str
    product: str
    N: int
    E: int
    k: int
    D: int
    F: int
    dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        sizes = f"N={self.N} E={self.E} k={self.k} D={self.D} F={self.F}"
        return f"{self.model}, {self.product}: {sizes}"

    @property
    def rows(self) -> int:
        return self.N * self.k

    @property
    def moved_bytes(self) -> int:
        """Least traffic of a call on average: chosen experts' weights, x and y."""
        touched = np.mean([(sizes > 0).sum() for sizes in self.routes])
        values = touched * self.D * self.F + self.rows * (self.D + self.F)
        return round(jnp.dtype(self.dtype).itemsize * values)

    @property
    def num_sets(self) -> int:
        """Other tokens choose other experts: so many, for weights of four times the L2
        cache, or none twice while they are timed."""
        fewest = self.k * self.D * self.F * jnp.dtype(self.dtype).itemsize
        return max(2, min(-(-4 * L2_BYTES // fewest), common.REPEATS + 2))

    @functools.cached_property
    def routes(self) -> list[np.ndarray]:
        """[E], rows of each expert, for each set."""
        random = np.random.default_rng(0)
        return [self._draw(random) for _ in range(self.num_sets)]

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        order = np.argsort(random.random((self.N, self.E)), axis=1)
        return np.bincount(order[:, : self.k].ravel(), minlength=self.E)

    @property
    def heuristic(self) -> GroupedDotConfig:
        itemsize = jnp.dtype(self.dtype).itemsize
        return tuning.heuristic(self.rows, self.E, self.D, self.F, itemsize)


MODELS = {"Qwen3-Next": (512, 10), "Qwen3.5-MoE": (256, 8)}
PRODUCTS = {"gate and up": (2048, 1024), "down": (512, 2048)}


def problems(quick: bool = False) -> list[Problem]:
    return [
        Problem(model, product, N, *MODELS[model], *PRODUCTS[product])
        for model in MODELS
        for product in PRODUCTS
        for N in ((1, 64) if quick else TOKENS)
    ]


def make_inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """All sets take of the same weights."""
    p = problem
    keys = jax.random.split(jax.random.key(seed), p.num_sets + 1)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key, shape):
        return jax.random.normal(key, shape, jnp.dtype(p.dtype))

    return {
        "sets": [
            {
                "x": normal(key, (p.rows, p.D)),
                "group_sizes": jnp.asarray(sizes, jnp.int32),
            }
            for key, sizes in zip(keys[1:], p.routes, strict=True)
        ],
        "weights": normal(keys[0], (p.E, p.D, p.F)),
    }


def multiply(problem: Problem, inputs: Mapping[str, Any], **options) -> peers.Call:
    del problem
    step = jax.jit(functools.partial(grouped_dot, **options))
    sets, held = inputs["sets"], {}

    def run(i):
        given = sets[i % len(sets)]
        held["out"] = step(given["x"], inputs["weights"], given["group_sizes"])

    return peers.Call(run, lambda: held, lambda name: True, "")


def expect(problem: Problem, inputs: Mapping[str, Any]) -> dict[str, Expected]:
    """The first set's rows, or some of them, by the oracle."""
    given, sizes = inputs["sets"][0], problem.routes[0]
    some = np.arange(problem.rows)[:: -(-problem.rows // CHECKED_ROWS)]
    group = np.searchsorted(np.cumsum(sizes), some, side="right")
    counts = np.bincount(group, minlength=problem.E)
    y = grouped_dot(
        given["x"][some],
        inputs["weights"],
        jnp.asarray(counts, jnp.int32),
        out_dtype=jnp.float32,
        implementation="reference",
    )
    return {"out": Expected(some, np.asarray(y))}


def tolerance(problem: Problem, what: str, *, is_ours: bool) -> float:
    del is_ours
    return testing.TOLERANCE[what, problem.dtype]


def candidates(problem: Problem) -> list[GroupedDotConfig]:
    """The heuristic's launch, and others with one or two fields doubled or halved."""
    plain = dataclasses.asdict(problem.heuristic)
    factors = list(itertools.product(plain, (0.5, 2)))
    found = []
    for count in range(3):
        for changes in itertools.combinations(factors, count):
            changed = {name: int(plain[name] * factor) for name, factor in changes}
            fields = plain | changed
            if len(changed) == count and is_possible(fields, problem):
                found.append(GroupedDotConfig(**fields))
    return found


def is_possible(fields: dict[str, int], problem: Problem) -> bool:
    rows, columns, summed = (fields[f"block_{axis}"] for axis in "lfd")
    operands = (rows + columns) * summed * jnp.dtype(problem.dtype).itemsize
    return (
        min(rows, columns, summed) >= tuning.MIN_DOT
        and max(rows, columns, summed) <= tuning.MAX_BLOCK
        and 1 <= fields["num_warps"] <= MAX_WARPS
        and fields["num_stages"] >= 1
        and fields["num_stages"] * operands <= SHARED_BYTES
        and rows * columns <= SUMS_IN_A_LANE * LANES * fields["num_warps"]
    )


def contenders(problem: Problem, *, tune: bool) -> dict[str, common.Build]:
    triton = functools.partial(multiply, implementation="triton")
    found = {"triton": triton}
    for config in candidates(problem) if tune else []:
        fields = dataclasses.asdict(config).items()
        name = " ".join(f"{field}={value}" for field, value in fields)
        found[f"triton {name}"] = functools.partial(triton, config=config)
    return found


def dense(problem: Problem) -> dict[str, common.Build]:
    """XLA's expansion, of E times the work; it may not fit."""
    del problem
    return {"xla": functools.partial(multiply, implementation="xla")}


def suite(*, tune: bool) -> Suite:
    return Suite(
        name="experts",
        inputs=INPUTS,
        make_inputs=make_inputs,
        expect=expect,
        tolerance=tolerance,
        ours=functools.partial(contenders, tune=tune),
        peers=dense,
    )


def main(
    quick: bool = False, tune: bool = False, out: pathlib.Path | None = None
) -> None:
    common.run_suite(suite(tune=tune), problems(quick), out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
