"""Steps of replay one after another, each row at its own place of its ring."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import update
from common import L2_BYTES

import gdn_jax
from gdn_jax import ReplayConfig, ReplayState

STEPS = 64  # of each row that are timed: every row folds a few times
SETS = 8  # of tokens, which take turns


@dataclasses.dataclass(frozen=True)
class Problem:
    """N rows of T tokens a step. `turns` is how many groups of N slots take turns; 0 is
    so many that they are more than four times the L2 cache."""

    N: int
    T: int
    state_dtype: str
    accepts: str = "uniform"
    R: int = 16
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128
    turns: int = 0

    @property
    def others(self) -> update.Problem:
        """What writes states is measured on."""
        sizes = self.N, self.T, self.H, self.HV, self.K, self.V
        return update.Problem(*sizes, state_dtype=self.state_dtype, dense=True)

    @property
    def groups(self) -> int:
        group = self.others.state_bytes * self.N
        return self.turns or max(1, -(-4 * L2_BYTES // group))


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
    """[steps, N]: of a row's step before, at each of its steps."""
    shape, T = (STEPS, problem.N), problem.T
    if problem.accepts == "uniform":
        drawn = np.random.default_rng(0).integers(1, T + 1, shape)
    else:
        drawn = np.full(shape, T if problem.accepts == "all" else 1)
    return drawn.astype(np.int32)


def make_tables(problem: Problem) -> jax.Array:
    """[groups, N]"""
    slots = jnp.arange(problem.N * problem.groups, dtype=jnp.int32)
    return slots.reshape(problem.groups, problem.N)


class Inputs(NamedTuple):
    """Of steps; `sets` and `tables` take turns."""

    state: ReplayState
    tables: jax.Array  # [groups, N]
    sets: list[tuple[jax.Array, ...]]
    accepted: jax.Array  # [steps, N]

    def first(self, rows: int) -> "Inputs":
        """The first rows of the first group, and no slots but theirs."""
        sets = [
            tuple(x[:rows] if x.ndim > 1 else x for x in tokens) for tokens in self.sets
        ]
        state = slots_of(self.state, rows)
        return Inputs(state, self.tables[:1, :rows], sets, self.accepted[:, :rows])


def slots_of(state: ReplayState, count: int) -> ReplayState:
    """The first ones, in memory of their own."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf[:count]), state)


def make_inputs(problem: Problem) -> Inputs:
    made = make_state(problem), make_tables(problem), make_tokens(problem)
    return Inputs(*made, jnp.asarray(make_accepted(problem)))


Step = Callable[..., tuple[ReplayState, jax.Array]]


@functools.cache
def make_step(**options: Any) -> Any:
    step = functools.partial(gdn_jax.replay_update, **options)
    return jax.jit(step, donate_argnums=0)


def compile_step(problem: Problem, config: ReplayConfig | None) -> Step:
    """The kernel's, from shapes alone."""
    state = jax.eval_shape(lambda: make_state(problem))
    [one, *_] = make_tokens(dataclasses.replace(problem, N=1, turns=1))
    tokens = (
        jax.ShapeDtypeStruct(
            (problem.N, *x.shape[1:]) if x.ndim > 1 else x.shape, x.dtype
        )
        for x in one
    )
    rows = jax.ShapeDtypeStruct((problem.N,), jnp.int32)
    step = make_step(implementation="triton", config=config)
    return step.lower(state, *tokens, slots=rows, num_accepted=rows).compile()


def steps_of(inputs: Inputs, step: Step) -> Iterator[tuple[ReplayState, jax.Array]]:
    """(state, out) after each step. Donates the inputs' state."""
    tables, accepted = list(inputs.tables), list(inputs.accepted)
    state = inputs.state
    for i in itertools.count():
        turn, group = divmod(i, len(tables))
        tokens = inputs.sets[(turn + group) % len(inputs.sets)]
        tables_of = dict(slots=tables[group], num_accepted=accepted[turn % STEPS])
        state, out = step(state, *tokens, **tables_of)
        yield state, out
