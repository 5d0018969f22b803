"""Checks of `fused_layer_step`'s arguments, and the form that implementations take."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax import _triton
from gdn_jax.ops import checks
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta.arguments import check_scale, check_slots
from gdn_jax.ops.gated_delta.call import GateOptions, dtype_before_norm
from gdn_jax.ops.gated_delta.call import Options as RuleOptions
from gdn_jax.ops.gated_delta.replay_state import (
    ReplayState,
    check_state,
    varying_as,
)
from gdn_jax.ops.gated_rms_norm.api import check_options
from gdn_jax.ops.layer_step.call import (
    LAYOUTS,
    Heads,
    Inputs,
    Options,
    Projected,
    Weights,
    pool_of,
)
from gdn_jax.ops.tables import check_tables


def pack(
    state: Any,
    qkvz: Any,
    ba: Any,
    layout: Any,
    weights: Mapping[str, Any],
    given: Batch,
    conv_slots: Any,
    *,
    null_slot: Any,
    eps: Any,
    activation: Any,
    scale: Any,
    qk_l2norm: Any,
    gating: GateOptions,
) -> tuple[Inputs, Options, Callable[[Array], Array]]:
    """`unpack` gives [L HV V] the caller's axes."""
    conv, recurrent = _pair(state)
    pool = pool_of(recurrent)
    projected, heads = _projected(conv, pool, qkvz, ba, layout)
    arrays = {name: checks.floating(name, x) for name, x in weights.items()}
    _check_weights(arrays, heads, conv)
    own = None if conv_slots is None else checks.integers("conv_slots", conv_slots)
    lead, L = projected.z.shape[:-1], math.prod(projected.z.shape[:-1])
    packed = jax.tree.map(lambda x: x.reshape(L, x.shape[-1]), projected)
    x = Inputs(conv, recurrent, packed, Weights(*arrays.values()), given, own)
    tokens = _check_batch(x, lead, null_slot)
    states = {"state[1]": pool}
    if isinstance(recurrent, ReplayState):
        _check_records(recurrent, heads, projected.z.dtype)
        _check_one_stands(given, tokens)
        states = {f"state[1].{name}": y for name, y in recurrent._asdict().items()}
    checks.check_sharding(
        dict(zip(("state[0].buffer", "state[0].start"), conv, strict=True))
        | states
        | {"conv_slots": own}
        | dict(zip(("qkvz", "qkvz", "ba", "ba"), projected, strict=True))
        | arrays
        | given._asdict()
    )
    eps = check_options(eps, activation)
    options = RuleOptions(
        tokens_per_row=tokens,
        scale=check_scale(scale, heads.K),
        qk_l2norm=checks.flag("qk_l2norm", qk_l2norm),
        null_slot=checks.null_slot_of(null_slot, pool.shape[0], given.slots),
        per_token_states=False,
        out_dtype=dtype_before_norm(projected.z.dtype),
        gating=gating,
        longest=x.columns,
    )
    tables: tuple[Any, ...] = conv.start, given, own
    if isinstance(recurrent, ReplayState):  # whose counters say which rows are null
        tables += recurrent.start, recurrent.committed, recurrent.pending
        states = varying_as(recurrent, x, tables)
    else:
        states = _triton.varying_like(recurrent, x)
    varying = ConvState(
        _triton.varying_like(conv.buffer, x), _triton.varying_like(conv.start, tables)
    )
    x = x._replace(conv=varying, recurrent=states)

    def unpack(out: Array) -> Array:
        return out.reshape(*lead, heads.HV * heads.V)

    return x, Options(options, heads, eps, activation), unpack


def _pair(state: Any) -> tuple[ConvState, Array | ReplayState]:
    if not isinstance(state, tuple) or len(state) != 2:
        remedy = "The convolution's state and the rule's pool."
        checks.fail("state", type(state).__name__, "(ConvState, pool)", remedy)
    conv, recurrent = state
    if not isinstance(conv, ConvState):
        remedy = "Make one with ConvState.zeros."
        checks.fail("state[0]", type(conv).__name__, "a ConvState", remedy)
    buffer = checks.floating("state[0].buffer", conv.buffer)
    start = checks.integers("state[0].start", conv.start)
    if buffer.ndim != 3:
        checks.fail("state[0].buffer", buffer.shape, "[P, C, R]", "ConvState.zeros.")
    if start.shape != buffer.shape[:1]:
        wanted = f"[P] = ({buffer.shape[0]},)"
        checks.fail("state[0].start", start.shape, wanted, "One a slot.")
    if isinstance(recurrent, ReplayState):
        check_state(recurrent)
        return ConvState(buffer, start), recurrent
    recurrent = checks.floating("state[1]", recurrent)
    if recurrent.ndim != 4:
        remedy = "Add the missing axes."
        checks.fail("state[1]", recurrent.shape, "[P or N, HV, V, K]", remedy)
    return ConvState(buffer, start), recurrent


def _check_records(state: ReplayState, heads: Heads, dtype: Any) -> None:
    if state.log_decay.ndim != 3:
        remedy = "KDA has no fused step."
        checks.fail("state[1].log_decay", state.log_decay.shape, "[P, HV, R]", remedy)
    if state.k.shape[1] != heads.H:
        wanted = f"H = {heads.H}, as state[0] has channels of"
        remedy = "It is num_key_heads of the ReplayState."
        checks.fail("state[1].k", f"{state.k.shape[1]} key heads", wanted, remedy)
    if jnp.promote_types(dtype, state.k.dtype) != state.k.dtype:
        remedy = f"Make the ReplayState with key_dtype={dtype}."
        checks.fail("qkvz", dtype, f"of a dtype that {state.k.dtype} holds", remedy)


def _check_one_stands(given: Batch, tokens: int | None) -> None:
    """Of the last step, which the convolution takes for granted."""
    if given.num_accepted is None and tokens != 1:
        got = "None with rows of " + ("any length" if tokens is None else f"{tokens}")
        remedy = "Several tokens stay pending in a ReplayState until it says."
        checks.fail("num_accepted", got, "given with a ReplayState", remedy)


def _projected(
    conv: ConvState, recurrent: Array, qkvz: Any, ba: Any, layout: Any
) -> tuple[Projected, Heads]:
    if layout not in LAYOUTS:
        remedy = "Qwen3-Next's is interleaved, Qwen3.5's flat."
        checks.fail("layout", repr(layout), f"one of {', '.join(LAYOUTS)}", remedy)
    _, HV, V, K = recurrent.shape
    C = conv.buffer.shape[1]
    keys = C - HV * V
    H = keys // (2 * K) if K else 0
    if min(H, HV, V) < 1 or keys != H * 2 * K or HV % H:
        wanted = f"[P, C, R] with C = 2 H K + HV V, of HV = {HV}, V = {V} and K = {K}"
        remedy = "HV is a multiple of H, and none of them is 0."
        checks.fail("state[0].buffer", conv.buffer.shape, wanted, remedy)
    apart = isinstance(qkvz, tuple)
    sizes = [len(x) if isinstance(x, tuple) else 1 for x in (qkvz, ba)]
    is_list = isinstance(qkvz, list) or isinstance(ba, list)
    if is_list or sizes not in ([1, 1], [2, 2]) or (apart and layout != "flat"):
        remedy = "Two arrays each, of layout='flat', or one each."
        got = f"{type(qkvz).__name__} beside ba {type(ba).__name__}, layout {layout!r}"
        checks.fail("qkvz", got, "an array, or with ba a tuple of two", remedy)
    if apart:
        names = "qkvz[0]", "qkvz[1]", "ba[0]", "ba[1]"
        widths, given = (C, HV * V, HV, HV), (*qkvz, *ba)
    else:
        names, widths, given = ("qkvz", "ba"), (C + HV * V, 2 * HV), (qkvz, ba)
    arrays = [checks.floating(name, x) for name, x in zip(names, given, strict=True)]
    lead = arrays[0].shape[:-1]
    for name, x, width in zip(names, arrays, widths, strict=True):
        if len(lead) not in (1, 2) or x.shape != (*lead, width):
            first = "" if x is arrays[0] else f", the leading axes {lead} of {names[0]}"
            wanted = f"[N, T, {width}] or [L, {width}]{first}"
            checks.fail(name, x.shape, wanted, f"H = {H} of the state's channels.")
        if x.dtype != arrays[0].dtype:
            remedy = "Projections have one dtype."
            checks.fail(name, x.dtype, f"{names[0]}'s {arrays[0].dtype}", remedy)
    heads = Heads(H, HV, K, V, layout == "interleaved", apart)
    return Projected(*(arrays if apart else (arrays[0],) * 2 + (arrays[1],) * 2)), heads


def _check_weights(weights: Mapping[str, Array], heads: Heads, conv: ConvState) -> None:
    C, R = conv.buffer.shape[1:]
    filters = weights["conv_weight"]
    if filters.ndim != 2 or filters.shape[0] != C or not 1 <= filters.shape[1] <= R:
        wanted = f"[C, W] with C = {C} and W <= {R}, the columns of state[0]"
        checks.fail("conv_weight", filters.shape, wanted, "Channels come first.")
    sizes = dict(A_log=("HV", heads.HV), dt_bias=("HV", heads.HV))
    sizes |= dict(norm_weight=("V", heads.V))
    for name, (axis, size) in sizes.items():
        if weights[name].shape != (size,):
            remedy = "KDA has no fused step." if axis == "HV" else "One a value."
            wanted = f"[{axis}] = ({size},)"
            checks.fail(name, weights[name].shape, wanted, remedy)


def _check_replay_tables(x: Inputs, tokens: int | None) -> None:
    slots, window = x.tables.slots, x.recurrent.window
    if slots is not None and slots.ndim > 1:
        remedy = "A slot keeps records of drafts itself: it needs no slot for each."
        checks.fail("slots", slots.shape, "[N], one slot a row", remedy)
    if tokens is not None and tokens > window:
        wanted, remedy = f"at most R = {window}", "Read prompts with chunk_update."
        checks.fail("qkvz", f"{tokens} tokens a row", wanted, remedy)


def _check_batch(x: Inputs, lead: tuple[int, ...], null_slot: Any) -> int | None:
    """Tokens of each row, where all have as many."""
    given = x.tables
    rows, tokens, source = checks.rows_of(lead, given.cu_seqlens)
    room = f"room for S = {x.columns} tokens in state[0]"
    if tokens is not None and tokens > x.columns:
        remedy = "Make the ConvState with columns=S, or use the ops for prompts."
        checks.fail("qkvz", f"T = {tokens} with {room}", "[N, T, ..], T <= S", remedy)
    if isinstance(x.recurrent, ReplayState):
        _check_replay_tables(x, tokens)
        check_slots(x.pool, given._replace(num_accepted=None), rows, tokens, source)
    else:
        check_slots(x.pool, given, rows, tokens, source)
    if given.slots is not None and given.slots.shape[1:] > (x.columns,):
        got, remedy = f"{given.slots.shape} with {room}", "Make it with columns=S."
        checks.fail("slots", got, "[N, S] of at most its S", remedy)
    if given.slots is None and x.conv.start.shape[0] != rows:
        got, wanted = f"{x.conv.start.shape[0]} slots", f"of {rows}, as many as rows"
        checks.fail("state[0]", got, wanted, "Pass slots to use a pool.")
    check_tables(given, x.conv_slots, lead, x.pools(null_slot))
    return tokens
