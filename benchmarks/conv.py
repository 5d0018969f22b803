"""The causal convolution: python benchmarks/conv.py [--quick] [--no-tune]

Decoding, verifying drafts and whole sequences, by Triton, by XLA and by every peer that
can be imported, in one run; without either option by other launches of our kernel too.
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
import prefill
import typer
from common import L2_BYTES, Expected, Suite
from jax.experimental import pallas as pl

from gdn_jax import ConvConfig, ConvState, causal_conv1d, testing
from gdn_jax.ops.causal_conv1d import tuning

BATCHES = (1, 8, 64, 256, 1024)
DRAFTS = (8, 64)
DENSE = ((1, 2048), (1, 8192), (4, 2048))
QWEN = 2 * 16 * 128 + 32 * 128  # q, k and v of Qwen3.5-9B and Qwen3-Next
INPUTS = "normal x, filter and state; slots and starts of rings in random order"
CHECKED_TOKENS = 512
DEALT = ("ahead", "each", "parts", "num_warps")  # what a program holds at once
# Values of x in a lane; twice as many take all registers, and half a minute to compile.
HELD = 64


@dataclasses.dataclass(frozen=True)
class Problem:
    """N rows of T tokens; or packed rows of `lengths`. S > 1 is a speculative step."""

    N: int
    T: int = 1
    lengths: tuple[int, ...] = ()
    S: int = 1
    C: int = QWEN
    W: int = 4
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.lengths and len(self.lengths) != self.N:
            raise ValueError(f"lengths must be N; got {self}.")

    @property
    def title(self) -> str:
        rows = f" of {self.lengths}" if len(set(self.lengths)) > 1 else ""
        kind = " packed" if self.lengths else ""
        return f"N={self.N} T={self.T}{kind}{rows} S={self.S} C={self.C} W={self.W}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.N * self.T

    @property
    def ring(self) -> int:
        return self.W - 1 + self.S

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def moved_bytes(self) -> int:
        """Least traffic: tokens in and out, the filter, and the inputs that a row still
        needs, read and written."""
        columns = 2 * self.tokens + self.W + 2 * self.N * (self.ring - 1)
        return self.itemsize * self.C * columns

    @property
    def num_sets(self) -> int:
        """So many that the calls take turns through four times the L2 cache, or, of
        small ones, that none comes round again while they are timed."""
        count = -(-4 * L2_BYTES // self.moved_bytes)
        return max(2, min(count, common.REPEATS + 2))

    @property
    def P(self) -> int:
        """A pool of four times the L2 cache, and slots for every set."""
        slot = self.itemsize * self.C * self.ring
        return max(self.N * self.num_sets, -(-4 * L2_BYTES // slot))

    @property
    def heuristic(self) -> ConvConfig:
        sizes = self.tokens, self.N, self.C, self.W, self.itemsize
        return tuning.heuristic(*sizes, ragged=bool(self.lengths))


def problems(quick: bool = False) -> list[Problem]:
    decode = [Problem(N) for N in BATCHES]
    if quick:
        return [*decode, Problem(8, 4, S=4), Problem(1, 2048)]
    mixed, drafts = prefill.MIXED, [(4,) * N for N in DRAFTS]
    return [
        *decode,
        *(Problem(N, 4, S=4) for N in DRAFTS),
        *(Problem(len(rows), 4, rows, S=4) for rows in drafts),
        *(Problem(N, T) for N, T in DENSE),
        Problem(len(mixed), sum(mixed) // len(mixed), mixed),
    ]


def make_inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """On the device, from normal draws; never zeros, which run faster than data."""
    p, random = problem, np.random.default_rng(seed)
    keys = iter(jax.random.split(jax.random.key(seed), 2 + p.num_sets))

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key, shape):
        return jax.random.normal(key, shape, jnp.float32).astype(p.dtype)

    def integers(x) -> jax.Array:
        return jnp.asarray(x, jnp.int32)

    shape = (p.tokens, p.C) if p.lengths else (p.N, p.T, p.C)
    order = random.permutation(p.P)[: p.num_sets * p.N].reshape(p.num_sets, p.N)
    bounds = np.cumsum([0, *p.lengths])
    accepted = random.integers(1, p.S + 1, p.N)
    return {
        "sets": [
            {"x": normal(next(keys), shape), "slots": integers(slots)}
            for slots in order
        ],
        "weight": normal(next(keys), (p.C, p.W)),
        # last, so that it leaves nothing of the tokens in the L2 cache
        "state": ConvState(
            normal(next(keys), (p.P, p.C, p.ring)),
            integers(random.integers(0, p.ring, p.P)),
        ),
        "num_accepted": integers(accepted) if p.S > 1 else None,
        "cu_seqlens": integers(bounds) if p.lengths else None,
    }


def ours(problem: Problem, inputs: Mapping[str, Any], **options) -> peers.Call:
    """Under jit, the pool donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, given, weight, tables):
        return causal_conv1d(state, weight=weight, **given, **tables, **options)

    tables = {name: inputs[name] for name in ("num_accepted", "cu_seqlens")}
    sets = inputs["sets"]
    held = {"state": jax.tree.map(jnp.array, inputs["state"])}

    def run(i):
        given = sets[i % len(sets)]
        state, out = step(held["state"], given, inputs["weight"], tables)
        held.update(state=state, out=out, slots=given["slots"])

    def result():
        state = dense_of(problem, held["state"], held["slots"])
        return {"state": state, "out": held["out"]}

    return peers.Call(run, result, lambda name: True, "")


def dense_of(problem: Problem, state: ConvState, slots: jax.Array) -> jax.Array:
    """[N, C, R - 1]: what the rows of these slots still need, oldest first."""
    rows = ConvState(state.buffer[slots], state.start[slots])
    return rows.to_dense(problem.ring)


def expect(problem: Problem, inputs: Mapping[str, Any]) -> dict[str, Expected]:
    """What our oracle says in float32 of the first call: of dense rows, of the first
    few, and of many tokens, of some, which are of every place in a block."""
    p, given = problem, inputs["sets"][0]
    count = p.N if p.lengths else min(p.N, max(1, CHECKED_TOKENS // p.T))
    rows, accepted = slice(count), inputs["num_accepted"]
    slots = given["slots"][rows]
    buffer, start = inputs["state"]
    call = jax.jit(functools.partial(causal_conv1d, implementation="reference"))
    state, out = call(
        ConvState(buffer[slots].astype(jnp.float32), start[slots]),
        given["x"][slice(None) if p.lengths else rows].astype(jnp.float32),
        inputs["weight"].astype(jnp.float32),
        num_accepted=None if accepted is None else accepted[rows],
        cu_seqlens=inputs["cu_seqlens"],
    )
    some = slice(None, None, p.tokens // CHECKED_TOKENS | 1)  # odd: blocks are not
    where = some if p.lengths else (rows, some)
    history = dense_of(p, state, jnp.arange(count))
    return {
        "state": Expected(rows, np.asarray(history)),
        "out": Expected(where, np.asarray(out[where])),
    }


def tolerance(problem: Problem, what: str, *, is_ours: bool) -> float:
    """Peers round more than we do in places; 4 still tells right from wrong."""
    return (1 if is_ours else 4) * testing.TOLERANCE[what, problem.dtype]


def candidates(problem: Problem) -> list[ConvConfig]:
    """The heuristic's launch and its neighbours: one field doubled or halved, or as
    many values held by a program, dealt out otherwise."""
    plain = dataclasses.asdict(problem.heuristic)
    changes = [
        {},
        *({name: factor} for name in plain for factor in (0.5, 2)),
        *({a: 0.5, b: 2} for a, b in itertools.permutations(DEALT, 2)),
    ]
    longest = max(problem.lengths, default=problem.T)
    least = min(problem.W - 1, longest)
    found = []
    for change in changes:
        fields = {name: int(n * change.get(name, 1)) for name, n in plain.items()}
        useful = (
            0 not in fields.values()
            and fields["ahead"] <= fields["tokens"]
            and least <= fields["tokens"] <= pl.next_power_of_2(longest)
            and fields["each"] * problem.itemsize <= tuning.LOAD_BYTES
            and fields["ahead"] * fields["each"] * fields["parts"] <= HELD
        )
        if useful:
            found.append(ConvConfig(**fields))
    return found


def contenders(problem: Problem, *, tune: bool) -> dict[str, common.Build]:
    found = {
        name: functools.partial(ours, implementation=name) for name in ("triton", "xla")
    }
    for config in candidates(problem) if tune else []:
        fields = dataclasses.asdict(config) | {"channels": config.channels}
        name = " ".join(f"{field}={value}" for field, value in fields.items())
        found[f"triton {name}"] = functools.partial(
            ours, implementation="triton", config=config
        )
    return found


def peers_of(problem: Problem) -> Mapping[str, peers.ConvPeer]:
    if problem.S > 1:
        return peers.CONV_VERIFY
    return peers.CONV_DECODE if problem.T == 1 else peers.CONV_PREFILL


def suite(*, tune: bool) -> Suite:
    return Suite(
        name="conv",
        inputs=INPUTS,
        make_inputs=make_inputs,
        expect=expect,
        tolerance=tolerance,
        ours=functools.partial(contenders, tune=tune),
        peers=peers_of,
    )


def main(
    quick: bool = False, tune: bool = True, out: pathlib.Path | None = None
) -> None:
    common.run_suite(suite(tune=tune and not quick), problems(quick), out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
