"""Steps of replay one after another, each row at its own place of its ring."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import update
from common import L2_BYTES

import gdn_jax
from gdn_jax import ReplayConfig, ReplayState

STEPS = 64  # of each row that are timed: every row folds a few times
SETS = 8  # of tokens, which take turns
CHECKED_ROWS = 8


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


Step = Callable[..., tuple[ReplayState, jax.Array]]


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


def checked(problem: Problem) -> Problem:
    """Small enough for the reference, and each step on the slots of the last."""
    return dataclasses.replace(problem, N=CHECKED_ROWS, turns=1)


def steps_of(
    problem: Problem, step: Step, state: ReplayState | None = None
) -> Iterator[tuple[ReplayState, Any]]:
    """(state, out) after each step, from `make_state`'s or another state."""
    tables, sets = list(make_tables(problem)), make_tokens(problem)
    state = make_state(problem) if state is None else state
    accepted = [jnp.asarray(each) for each in make_accepted(problem)]
    for i in itertools.count():
        turn, group = divmod(i, problem.groups)
        tables_of = dict(slots=tables[group], num_accepted=accepted[turn % STEPS])
        state, out = step(state, *sets[i % SETS], **tables_of)
        yield state, out
