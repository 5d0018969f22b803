"""Steps of a layer on replay's states by cases: their inputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from layer_steps import poison

from gdn_jax import (
    ConvState,
    ReplayConfig,
    ReplayState,
)

N, P = 4, 7
FRESH, FRESH_AT = 1, 4  # the row and the step where it begins afresh
PARTS = ReplayConfig(block_v=16, block_k=16, steps_v=1, prepare_k=16)


@dataclasses.dataclass(frozen=True)
class Case:
    """`columns` is S; rows have up to as many tokens, of any number where `packed`.
    `says`: whether calls tell how many stand."""

    name: str
    columns: int = 3
    layout: str = "flat"
    heads: tuple[int, int, int, int] = (2, 4, 32, 32)
    window: int = 16
    width: int = 4
    state_dtype: str = "float32"
    act_dtype: str = "float32"
    packed: bool = False
    pair: bool = False
    says: bool = True
    own_slots: bool = False
    null_slot: bool = False
    activation: str = "silu"
    config: ReplayConfig | None = None

    def __str__(self):
        return self.name


CASES = [
    Case("verify"),
    Case("verify, packed, interleaved", 4, "interleaved", packed=True, own_slots=True),
    Case("a token, nobody says", 1, says=False, pair=True, activation="sigmoid"),
    Case("a token, room for more", 3, says=False, layout="interleaved"),
    Case("a long window", 9, window=32, null_slot=True),
    Case("odd sizes", heads=(1, 3, 24, 20), layout="interleaved", own_slots=True),
    Case("blocks of K, parts of V", heads=(1, 2, 48, 40), width=2, config=PARTS),
    Case("bfloat16", 4, state_dtype="bfloat16", act_dtype="bfloat16"),
    Case("float16", 2, state_dtype="float16", act_dtype="float16", packed=True),
]


def make(case, seed=0):
    """(state, a function from a number and the pending counts to that step)."""
    (H, HV, K, V), S = case.heads, case.columns
    C, ring = 2 * H * K + HV * V, case.width - 1 + S
    random = np.random.default_rng(seed)

    def normal(*shape, dtype=case.act_dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    conv_slots = random.permutation(P)[:N].astype(np.int32)
    slots = random.permutation(P)[:N].astype(np.int32) if case.own_slots else conv_slots
    if case.null_slot:  # which others' slots are not
        slots = conv_slots = 1 + random.permutation(P - 1)[:N].astype(np.int32)
    pool = 0.1 * normal(P, HV, V, K, dtype=case.state_dtype)
    made = dict(num_key_heads=H, window=case.window, key_dtype=case.act_dtype)
    recurrent = ReplayState.from_dense(pool, **made)
    buffer = poison(normal(P, C, ring), np.setdiff1d(np.arange(P), conv_slots))
    conv = ConvState(buffer, jnp.asarray(random.integers(0, ring, P), jnp.int32))
    options = dict(
        conv_weight=normal(C, case.width) / 2,
        A_log=jnp.abs(normal(HV, dtype="float32")),
        dt_bias=normal(HV, dtype="float32"),
        norm_weight=1 + normal(V) / 8,
        conv_slots=conv_slots if case.own_slots else None,
    )

    def step(number, pending):
        lengths, lead = None, (N, S if case.says else 1)
        options["slots"] = slots.copy()
        tables = {}
        if case.says:
            most = np.maximum(pending[slots], 1)
            tables["num_accepted"] = random.integers(1, most + 1).astype(np.int32)
        nulls = [number % N] if number % 3 == 2 else []
        if nulls and case.says and number % 2:  # not one of the tokens that there are
            tables["num_accepted"][nulls] = [0, most[nulls[0]] + 1][number % 4 == 1]
        else:
            options["slots"][nulls] = 0 if case.null_slot else -1
        if case.says:
            tables["has_state"] = (np.arange(N) != FRESH) | (number != FRESH_AT)
            if number == FRESH_AT:
                tables["num_accepted"][FRESH] = S  # of a last step that is not its own
        if case.packed:
            lengths = random.integers(0, S + 1, N)
            if number == FRESH_AT:
                lengths[FRESH] = 1
            if number == 6:
                lengths[2], nulls = S + 1, [*nulls, 2]
            tables["cu_seqlens"] = np.int32([1, *(1 + np.cumsum(lengths))])
            lead = (1 + N * (S + 1),)
        qkvz, ba = normal(*lead, C + HV * V), normal(*lead, 2 * HV)
        nobody = np.array(nulls, int)
        if case.packed:
            nobody = _of_no_row(tables["cu_seqlens"], nulls, lead[0])
        qkvz, ba = (x.at[nobody].set(jnp.nan) for x in (qkvz, ba))
        if case.pair:
            qkvz, ba = (qkvz[..., :C], qkvz[..., C:]), (ba[..., :HV], ba[..., HV:])
        return (qkvz, ba), options | tables, nulls, nobody

    return (conv, recurrent), step


def _of_no_row(bounds, nulls, tokens):
    live = [n for n in range(N) if n not in nulls]
    owned = [np.arange(*bounds[n : n + 2]) for n in live]
    return np.setdiff1d(np.arange(tokens), np.concatenate(owned))


def of_decode(case=CASES[2]):
    state, step = make(case)
    tokens, options, *_ = step(0, np.zeros(P, int))
    return state, tokens, options | dict(layout="flat")
