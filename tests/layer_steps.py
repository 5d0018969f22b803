"""Steps of a layer by cases: their inputs, and what runs them."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax import ConvState, LayerStepConfig, fused_layer_step
from gdn_jax.ops.layer_step import api
from gdn_jax.ops.layer_step.chain import chain

KERNELS = ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]


@dataclasses.dataclass(frozen=True)
class Case:
    """`lengths`: tokens of each row, dense where they are as many, packed with one
    token before and two behind that nobody owns where they are not. `columns` is S; 1
    is plain decoding."""

    name: str
    lengths: tuple[int, ...] = (1, 1, 1)
    columns: int = 1
    layout: str = "flat"
    heads: tuple[int, int, int, int] = (2, 4, 32, 32)
    width: int = 4
    state_dtype: str = "float32"
    act_dtype: str = "float32"
    ring_dtype: str | None = None  # act_dtype
    nulls: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    pair: bool = False
    activation: str = "silu"
    config: LayerStepConfig | None = None
    state_scale: float = 0.1
    plain: bool = False

    def __str__(self):
        return self.name

    @property
    def verifies(self) -> bool:
        return self.columns > 1 and not self.plain

    @property
    def packed(self) -> bool:
        return len(set(self.lengths)) > 1


CASES = [
    Case("decode, flat"),
    Case("decode, interleaved", layout="interleaved", fresh=(1,)),
    Case("decode, two arrays each", pair=True, activation="sigmoid"),
    Case("decode, nulls", (1,) * 5, nulls=(0, 3), fresh=(2,), layout="interleaved"),
    Case("decode, bfloat16", state_dtype="bfloat16", act_dtype="bfloat16"),
    Case("decode, float16", state_dtype="float16", act_dtype="float16"),
    Case("decode, a ring of less", ring_dtype="bfloat16", fresh=(1,)),
    Case("verify, a ring of less", (4, 4), 4, ring_dtype="bfloat16"),
    Case("decode, past float16", act_dtype="float16", state_scale=1e7),
    Case(
        "parts of V, past float16",
        act_dtype="float16",
        state_scale=1e7,
        config=LayerStepConfig(8, 2, 2, 2),
    ),
    Case("odd sizes", heads=(1, 3, 24, 20), layout="interleaved", nulls=(1,)),
    Case("a filter of two", width=2, heads=(1, 2, 16, 48)),
    Case("tiles", config=LayerStepConfig(8, 2, 2), fresh=(0,)),
    Case(
        "last tile past the end", heads=(1, 1, 16, 24), config=LayerStepConfig(16, 1, 1)
    ),
    Case("parts of V", config=LayerStepConfig(8, 2, 2, 2), nulls=(1,), fresh=(0,)),
    Case("odd parts", heads=(1, 2, 16, 72), config=LayerStepConfig(16, 1, 1, 2)),
    Case(
        "a tile past the end", heads=(1, 1, 16, 96), config=LayerStepConfig(32, 1, 1, 2)
    ),
    Case("verify, parts, packed", (2, 4, 1), 4, config=LayerStepConfig(8, 2, 2, 4)),
    Case("four value heads a key head", heads=(1, 4, 16, 24), nulls=(1,)),
    Case("rows too long, packed", (1, 2, 1), layout="interleaved", too_long=(1,)),
    Case("verify", (4, 4, 4), 4, fresh=(1,)),
    Case("plain, packed, with room", (2, 3, 1), 3, plain=True),
    Case("verify, interleaved", (3, 3), 4, "interleaved", nulls=(1,)),
    Case("verify, packed", (2, 3, 0, 1, 5), 3, fresh=(3,), pair=True, too_long=(4,)),
    Case("verify, tiles, packed", (2, 1, 4), 4, config=LayerStepConfig(16, 2, 2)),
    Case("verify, bfloat16", (4, 4), 4, state_dtype="bfloat16", act_dtype="bfloat16"),
]


def make(case, seed=0):
    """(state, a function from a number to the step of that number)."""
    (H, HV, K, V), N, S = case.heads, len(case.lengths), case.columns
    C, ring, P = 2 * H * K + HV * V, case.width - 1 + S, len(case.lengths) * S + 2
    random = np.random.default_rng(seed)

    def normal(*shape, dtype=case.act_dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    start = jnp.asarray(random.integers(0, ring, P), jnp.int32)
    ring_dtype = case.ring_dtype or case.act_dtype
    conv = ConvState(normal(P, C, ring, dtype=ring_dtype), start)
    state = conv, case.state_scale * normal(P, HV, V, K, dtype=case.state_dtype)
    slots = random.permutation(P)[: N * S].reshape(N, S).astype(np.int32)
    slots[list(case.nulls)] = -1
    unused = np.setdiff1d(np.arange(P), slots)
    state = jax.tree.map(lambda x: poison(x, unused), state)
    weights = dict(
        conv_weight=normal(C, case.width) / 2,
        A_log=jnp.abs(normal(HV, dtype="float32")),
        dt_bias=normal(HV, dtype="float32"),
        norm_weight=1 + normal(V) / 8,
    )
    options = dict(layout=case.layout, activation=case.activation, **weights)
    lead = (N, case.lengths[0])
    bounds = np.concatenate([[1], 1 + np.cumsum(case.lengths)]).astype(np.int32)
    if case.packed:
        lead = (int(bounds[-1]) + 2,)
        options["cu_seqlens"] = jnp.asarray(bounds)
    options["slots"] = jnp.asarray(slots if case.verifies else slots[:, 0])

    def step(number):
        qkvz, ba = normal(*lead, C + HV * V), normal(*lead, 2 * HV)
        nobody = list(case.nulls)  # dense, in all cases
        if case.packed:  # a row's last steps read past its end
            owned = [np.arange(*bounds[n : n + 2]) for n in range(N)]
            live = [owned[n] for n in range(N) if n not in case.too_long]
            nobody = np.setdiff1d(np.arange(lead[0]), np.concatenate(live))
        qkvz, ba = (x.at[np.array(nobody, int)].set(jnp.nan) for x in (qkvz, ba))
        tables = {}
        if case.verifies:
            most = np.minimum(np.maximum(case.lengths, 1), S)
            tables["num_accepted"] = random.integers(1, most + 1).astype(np.int32)
        if number == 0 and case.fresh:
            has_state = np.ones(N, bool)
            has_state[list(case.fresh)] = False
            tables["has_state"] = jnp.asarray(has_state)
        tokens = qkvz, ba
        if case.pair:
            tokens = (qkvz[..., :C], qkvz[..., C:]), (ba[..., :HV], ba[..., HV:])
        return tokens, options | tables

    return state, step


def poison(x, slots):
    value = 99 if x.dtype == jnp.int32 else jnp.nan
    return x.at[jnp.asarray(slots, jnp.int32)].set(value)


@functools.cache
def jitted(implementation, layout, activation, config=None, ops=None):
    def run(state, tokens, options):
        in_turn = mock.patch.object(api, "_chain", functools.partial(chain_of, ops))
        with in_turn if ops else contextlib.nullcontext():
            return fused_layer_step(
                state,
                *tokens,
                layout=layout,
                activation=activation,
                implementation=implementation,
                config=config,
                **options,
            )

    # the ops one after another round what they hand on; a GPU's compiler need not
    options = {"xla_allow_excess_precision": False}
    return jax.jit(run, donate_argnums=0, compiler_options=options)


def chain_of(implementation, x, options, _):
    return chain(x, options, implementation)


def steps_of(case, implementation, config=None, ops=None):
    """After each of some steps: the state, out, and the step's tables. ops: the
    implementation of the ops, where "xla" says that they run in turn."""
    state, step = make(case)
    run = jitted(implementation, case.layout, case.activation, config, ops)
    for number in range(5):
        tokens, options = step(number)
        for name in ("layout", "activation"):
            del options[name]
        state, out = run(state, tokens, options)
        yield jax.tree.map(np.array, state), np.array(out), options
