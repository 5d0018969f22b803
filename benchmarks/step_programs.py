"""Steps of a layer between its projections, of which programs are made."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import replay_steps
import update

import gdn_jax
from gdn_jax import ConvState, ReplayState

STEPS = 8  # of a program: enough that XLA makes one CUDA graph of it
W = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """N rows of T tokens; with more than one they verify drafts. `replay`: their states
    are a `ReplayState`, each row at its own place of its ring."""

    N: int
    T: int
    H: int
    HV: int
    state_dtype: str
    K: int = 128
    V: int = 128
    replay: bool = False

    @property
    def op(self) -> str:
        return "replay_update" if self.replay else "fused_update"

    @property
    def records(self) -> replay_steps.Problem:
        sizes = dict(H=self.H, HV=self.HV, K=self.K, V=self.V)
        return replay_steps.Problem(self.N, self.T, self.state_dtype, **sizes)

    @property
    def rule(self) -> update.Problem:
        sizes = self.N, self.T, self.H, self.HV, self.K, self.V
        return update.Problem(*sizes, state_dtype=self.state_dtype, dense=True)

    @property
    def split(self) -> tuple[int, int, int]:
        return self.H * self.K, self.H * self.K, self.HV * self.V


class Inputs(NamedTuple):
    """`tokens` are of each step of a program, `tables` of each program: the rule's
    slots, the convolution's where they are others, and how many tokens stand."""

    weights: dict[str, jax.Array]
    tokens: list[dict[str, jax.Array]]
    tables: list[dict[str, jax.Array]]


def make_inputs(problem: Problem) -> Inputs:
    p, act = problem, jnp.bfloat16
    given = update.make_inputs(p.rule)
    keys = iter(jax.random.split(jax.random.key(2), 8 * STEPS))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(act)

    C = sum(p.split)
    weights = {name: given[name] for name in ("A_log", "dt_bias")}
    weights |= dict(conv_weight=normal(C, W) / 2, norm_weight=1 + normal(p.V) / 8)
    lead = p.N, p.T
    shapes = dict(
        channels=(*lead, C),
        z=(*lead, p.HV * p.V),
        a=(*lead, p.HV),
        b=(*lead, p.HV),
        q=(*lead, p.H, p.K),
        k=(*lead, p.H, p.K),
        v=(*lead, p.HV, p.V),
    )
    tokens = [
        {name: normal(*shape) for name, shape in shapes.items()} for _ in range(STEPS)
    ]
    if p.replay:
        return Inputs(weights, tokens, make_replay_tables(p))
    tables = [dict(slots=slots) for slots in given["slots"]]
    if p.T > 1:
        own = np.random.default_rng(3).permutation(p.N * len(tables)).astype(np.int32)
        for table, conv in zip(tables, own.reshape(-1, p.N), strict=True):
            table["conv_slots"] = jnp.asarray(conv)
            table["num_accepted"] = given["num_accepted"]
    return Inputs(weights, tokens, tables)


def make_replay_tables(problem: Problem) -> list[dict[str, jax.Array]]:
    """Of as many steps of each group as fold its rows some times."""
    groups = replay_steps.make_tables(problem.records)
    accepted = jnp.asarray(replay_steps.make_accepted(problem.records))
    tables = []
    for number, slots in itertools.product(range(len(accepted)), groups):
        stands = dict(num_accepted=accepted[number]) if problem.T > 1 else {}
        tables.append(dict(slots=slots) | stands)
    return tables


def make_state(problem: Problem) -> tuple[ConvState, jax.Array | ReplayState]:
    """Of one layer."""
    p, ring = problem, W - 1 + problem.T
    if p.replay:
        state = replay_steps.make_state(p.records)
        slots = len(state.start)
    else:
        state = update.make_inputs(p.rule)["state"]
        slots = len(state) // p.T
    shape = slots, sum(p.split), ring
    buffer = jax.random.normal(jax.random.key(4), shape, jnp.float32)
    start = jnp.arange(slots, dtype=jnp.int32) % ring
    return ConvState(buffer.astype(jnp.bfloat16), start), state


def make_states(problem: Problem) -> list[tuple[ConvState, Any]]:
    """Of the layers of a program."""
    return [make_state(problem) for _ in range(STEPS)]


def fused(state, weights, x, tables, **options):
    qkvz, ba = (x["channels"], x["z"]), (x["b"], x["a"])
    return gdn_jax.fused_layer_step(
        state, qkvz, ba, layout="flat", **weights, **tables, **options
    )


def chain(state, weights, x, tables, *, split, implementation):
    """As the layer has it, where no kernel takes all of it."""
    conv, pool = state
    of_rule = {key: table for key, table in tables.items() if key != "conv_slots"}
    of_conv = of_rule | dict(slots=tables.get("conv_slots", tables["slots"]))
    conv, qkv = gdn_jax.causal_conv1d(
        conv,
        x["channels"],
        weights["conv_weight"],
        split=split,
        implementation=implementation,
        **of_conv,
    )
    q, k, v = (y.reshape(x[n].shape) for n, y in zip("qkv", qkv, strict=True))
    pool, out = bare(
        (conv, pool), weights, x | dict(q=q, k=k, v=v), tables, implementation
    )
    z = x["z"].reshape(out.shape)
    out = gdn_jax.gated_rms_norm(out, z, weights["norm_weight"])
    return (conv, pool[1]), out.reshape(x["z"].shape)


def bare(state, weights, x, tables, implementation="triton"):
    """The rule alone."""
    conv, pool = state
    of_rule = {key: table for key, table in tables.items() if key != "conv_slots"}
    heads = weights["A_log"], x["a"], x["b"], weights["dt_bias"]
    is_replay = isinstance(pool, ReplayState)
    rule = gdn_jax.replay_update if is_replay else gdn_jax.fused_update
    pool, out = rule(
        pool, x["q"], x["k"], x["v"], *heads, implementation=implementation, **of_rule
    )
    return (conv, pool), out


def contenders(problem: Problem, config: Any) -> dict[str, Any]:
    options = dict(implementation="triton", config=config)
    in_turn = dict(split=problem.split, implementation="triton")
    return {
        "fused": functools.partial(fused, **options),
        "chain": functools.partial(chain, **in_turn),
        problem.op: bare,
    }


def program_of(step: Callable[..., Any]) -> Any:
    """A step of each layer, whose states are its own and whose slots are the rows'."""

    def program(states, weights, tokens, table):
        pairs = [
            step(state, weights, x, table)
            for state, x in zip(states, tokens, strict=True)
        ]
        states, outs = zip(*pairs, strict=True)
        return list(states), list(outs)

    return jax.jit(program, donate_argnums=0)


def compile_program(problem: Problem, step: Callable[..., Any]) -> Any:
    """From shapes alone."""
    states = jax.eval_shape(lambda: make_states(problem))
    inputs = jax.eval_shape(lambda: make_inputs(problem))
    arguments = inputs.weights, inputs.tokens, inputs.tables[0]
    return program_of(step).lower(states, *arguments).compile()


def compile_step(problem: Problem, step: Callable[..., Any]) -> Any:
    """The same of one step alone."""
    state = jax.eval_shape(lambda: make_state(problem))
    inputs = jax.eval_shape(lambda: make_inputs(problem))
    arguments = inputs.weights, inputs.tokens[0], inputs.tables[0]
    return jax.jit(step, donate_argnums=0).lower(state, *arguments).compile()
