"""Checks a call at the door and puts it into the packed form of call.py.

Every message names the argument, what came, what was wanted and a way out. Values
cannot be checked under jit; the null rule makes bad slots and counts harmless instead.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    GateOptions,
    Gates,
    Inputs,
    Options,
)

AnyGates = TypeVar("AnyGates", GateLogits, Gates)

FLOATS = ("float32", "bfloat16", "float16")


def pack(
    state,
    q,
    k,
    v,
    gates: GateLogits | Gates,
    *,
    slots,
    cu_seqlens,
    num_accepted,
    has_state,
    null_slot,
    scale,
    qk_l2norm,
    per_token_states,
    out_dtype,
    gating: GateOptions,
) -> tuple[Inputs, Options, Callable[[Array], Array]]:
    """(inputs, options, unpack): `unpack` gives a packed result the caller's axes."""
    state, q, k, v = (
        _floating(name, x) for name, x in dict(state=state, q=q, k=k, v=v).items()
    )
    tables = dict(slots=slots, cu_seqlens=cu_seqlens, num_accepted=num_accepted)
    slots, cu_seqlens, num_accepted = (
        None if x is None else integers(name, x) for name, x in tables.items()
    )
    if has_state is not None:
        has_state = jnp.asarray(has_state)
        if has_state.dtype != jnp.bool_:
            _fail(
                "has_state", has_state.dtype, "bool", "Compare it first, as in x > 0."
            )
    _check_heads(state, q, k, v)
    _check_gates(gates, v.shape[:-1], state.shape[3])
    dense = q.ndim == 4
    if cu_seqlens is not None:
        _check_boundaries(cu_seqlens, dense)
    if cu_seqlens is not None:
        rows, tokens = cu_seqlens.shape[0] - 1, None
        source = f"cu_seqlens of {rows + 1} entries makes {rows} rows"
    elif dense:
        rows, tokens = q.shape[:2]
        source = f"q {q.shape} has {rows} rows"
    else:
        rows, tokens = q.shape[0], 1
        source = f"without cu_seqlens each of {rows} packed tokens is a row"
    _check_slots(state, slots, num_accepted, has_state, rows, tokens, source)
    is_int = isinstance(null_slot, int | np.integer) and not isinstance(null_slot, bool)
    if null_slot is not None and not is_int:
        _fail("null_slot", repr(null_slot), "an int or None", "It is static.")

    def packed(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:]) if dense else x

    def unpack(x: Array) -> Array:
        return x.reshape(*v.shape[:2], *x.shape[1:]) if dense else x

    arrays = dict(state=state, q=q, k=k, v=v, slots=slots, cu_seqlens=cu_seqlens)
    arrays |= dict(num_accepted=num_accepted, has_state=has_state, **gates._asdict())
    _check_sharding(arrays)
    per_token = {name: packed(getattr(gates, name)) for name in gates.PER_TOKEN}
    inputs = Inputs(
        state,
        packed(q),
        packed(k),
        packed(v),
        gates._replace(**per_token),
        slots,
        cu_seqlens,
        num_accepted,
        has_state,
    )
    options = Options(
        tokens_per_row=tokens,
        scale=_check_scale(scale, q.shape[-1]),
        qk_l2norm=_flag("qk_l2norm", qk_l2norm),
        null_slot=_real_slot(null_slot, state, slots),
        per_token_states=_flag("per_token_states", per_token_states),
        out_dtype=_check_out_dtype(out_dtype, v.dtype),
        gating=gating,
    )
    return inputs, options, unpack


def gate_options(
    softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
) -> GateOptions:
    beta = _number("softplus_beta", softplus_beta)
    if not (beta > 0 and math.isfinite(beta)):
        remedy = "1.0 is the plain softplus."
        _fail("softplus_beta", beta, "a finite number > 0", remedy)
    if gate_lower_bound is not None:
        gate_lower_bound = _number("gate_lower_bound", gate_lower_bound)
        if not (gate_lower_bound < 0 and math.isfinite(gate_lower_bound)):
            _fail(
                "gate_lower_bound",
                gate_lower_bound,
                "a finite number < 0",
                "It is the smallest log-decay; GLM and Kimi-K3 use -5.",
            )
    threshold = _number("softplus_threshold", softplus_threshold)
    if math.isnan(threshold):
        _fail("softplus_threshold", threshold, "a number", "20.0 is vLLM's.")
    doubled = _flag("allow_neg_eigval", allow_neg_eigval)
    return GateOptions(beta, threshold, doubled, gate_lower_bound)


def _fail(name: str, got: object, wanted: str, remedy: str) -> None:
    raise ValueError(f"{name} must be {wanted}; got {got}. {remedy}")


def _floating(name: str, x: Any) -> Array:
    if x is None:
        _fail(name, "None", "an array", "It has no default.")
    if not hasattr(x, "dtype"):  # a list of numbers
        return jnp.asarray(x, jnp.float32)
    given = np.dtype(x.dtype)  # before JAX narrows float64
    if given.name not in FLOATS:
        _fail(name, given, f"one of {', '.join(FLOATS)}", "Cast it first.")
    return jnp.asarray(x)


def integers(name: str, x: Any) -> Array:
    if not hasattr(x, "dtype"):
        x = _integers_of_list(x)
    if x.dtype != jnp.int32:
        _fail(name, x.dtype, "int32", f"Pass jnp.asarray({name}, jnp.int32).")
    return jnp.asarray(x)


def _integers_of_list(x: Any) -> np.ndarray | Array:
    """int32 where that holds every number, whatever width JAX's own default has."""
    try:
        values = np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(x)
    if values.size == 0:
        return values.astype(np.int32)
    limits = np.iinfo(np.int32)
    fits = (values >= limits.min) & (values <= limits.max)
    return (
        values.astype(np.int32) if values.dtype.kind == "i" and fits.all() else values
    )


def _flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        remedy = "It is static: close over it instead of passing it through jit."
        _fail(name, type(x).__name__, "a Python bool", remedy)
    return bool(x)


def _number(name: str, x: Any) -> float:
    try:
        if isinstance(x, bool | str):
            raise TypeError
        return float(x)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a Python number, it is static; got {type(x).__name__}. "
            f"Close over it instead of passing it through jit."
        ) from None


def _real_slot(null_slot: Any, state: Array, slots: Array | None) -> int | None:
    """None where it names no slot: no table is given, or it is outside the pool."""
    if null_slot is None or slots is None or not 0 <= null_slot < state.shape[0]:
        return None
    return int(null_slot)


def _check_scale(scale: Any, K: int) -> float:
    if scale is None:
        return K**-0.5
    number = _number("scale", scale)
    if not 0 < number <= np.finfo(np.float32).max:
        _fail("scale", scale, "a finite number > 0 in float32", "None takes K**-0.5.")
    return number


def _check_out_dtype(out_dtype: Any, default: Any) -> np.dtype:
    try:
        dtype = np.dtype(default if out_dtype is None else out_dtype)
    except TypeError:  # no dtype at all
        dtype = np.dtype(object)
    if dtype.name not in FLOATS:
        _fail("out_dtype", out_dtype, f"one of {', '.join(FLOATS)}", "None: v's.")
    return dtype


def _check_sharding(arrays: dict[str, Array | None]) -> None:
    """Sharding in types leaves every gather to the caller; a kernel needs shard_map."""
    for name, x in arrays.items():
        spec = () if x is None else jax.typeof(x).sharding.spec
        if any(axis is not None for axis in spec):
            _fail(
                name,
                f"{spec} over explicit mesh axes",
                "whole, or split over automatic mesh axes or by shard_map",
                "Split heads or rows with jax.shard_map, or make the axes "
                "AxisType.Auto.",
            )


def _check_heads(state: Array, q: Array, k: Array, v: Array) -> None:
    if state.ndim != 4:
        _fail("state", state.shape, "[P or N, HV, V, K]", "Add the missing axes.")
    if q.ndim not in (3, 4):
        _fail("q", q.shape, "[N, T, H, K] (dense) or [L, H, K] (packed)", "Reshape it.")
    if k.shape != q.shape:
        _fail("k", k.shape, f"of q's shape {q.shape}", "Keys and queries share heads.")
    if v.shape[:-2] != q.shape[:-2] or v.ndim != q.ndim:
        wanted = f"{(*q.shape[:-2], 'HV', 'V')}, q's leading axes"
        remedy = "Pass the same tokens in q, k and v, heads after tokens: [N, T, H, K]."
        _fail("v", v.shape, wanted, remedy)
    heads, value_heads = q.shape[-2], v.shape[-2]
    if heads == 0 or value_heads % heads:
        _fail(
            "v",
            f"{value_heads} value heads over {heads} key heads",
            "of a multiple of the key heads (HV % H == 0)",
            "Value head i reads key head i // (HV // H); repeat or regroup heads.",
        )
    wanted = (value_heads, v.shape[-1], q.shape[-1])
    if state.shape[1:] != wanted:
        _fail(
            "state",
            state.shape,
            f"[P or N, HV, V, K] = [.., {', '.join(map(str, wanted))}]",
            "A [.., K, V] state needs swapaxes(-1, -2); heads come after tokens in q, "
            "k and v, [N, T, H, K].",
        )
    if 0 in wanted:
        axes = "[P or N, HV, V, K] with HV, V and K at least 1"
        _fail("state", state.shape, axes, "Only N, T, L and P may be 0.")


def floating_gates(kind: type[AnyGates], *given: Any) -> AnyGates:
    names = zip(kind._fields, given, strict=True)
    return kind(*(_floating(name, x) for name, x in names))


def check_gate_logits(logits: GateLogits) -> None:
    """The logits alone: b [.. HV] says how many value heads and tokens there are."""
    _check_sharding(logits._asdict())
    if logits.b.ndim == 0:
        _fail(
            "b", logits.b.shape, "[.., HV]", "It has one entry a token and value head."
        )
    per_k = logits.a.ndim > logits.b.ndim
    _check_gates(logits, logits.b.shape, logits.a.shape[-1] if per_k else None)


def _check_gates(
    gates: GateLogits | Gates, per_head: tuple[int, ...], K: int | None
) -> None:
    decay, beta = gates.per_token
    decay_name, beta_name = gates.PER_TOKEN
    each = "It has one entry a token and value head."
    if beta.shape != per_head:
        _fail(beta_name, beta.shape, str(per_head), each)
    if decay.shape not in (per_head, (*per_head, K)):
        per_k = (*per_head, "K" if K is None else K)
        wanted = f"{per_head}, or {per_k} for one decay per K (KDA)"
        _fail(decay_name, decay.shape, wanted, each)
    if isinstance(gates, GateLogits):
        heads = per_head[-1:]
        if gates.A_log.shape != heads:
            _fail(
                "A_log", gates.A_log.shape, f"[HV] = {heads}", "It is per value head."
            )
        wanted = (*heads, K) if decay.ndim > beta.ndim else heads
        if gates.dt_bias.shape != wanted:
            remedy = "It carries a K axis exactly where `a` does (KDA)."
            _fail("dt_bias", gates.dt_bias.shape, str(wanted), remedy)


def _check_boundaries(cu_seqlens: Array, dense: bool) -> None:
    if dense:
        _fail(
            "cu_seqlens",
            "dense tokens [N, T, ..]",
            "given with packed tokens [L, ..] alone",
            "Leave it out, or flatten the tokens to [N * T, ..].",
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        remedy = "It starts with 0 and ends with the number of tokens."
        _fail("cu_seqlens", cu_seqlens.shape, "[N + 1]", remedy)


def _check_slots(
    state: Array,
    slots: Array | None,
    num_accepted: Array | None,
    has_state: Array | None,
    rows: int,
    tokens: int | None,
    source: str,
) -> None:
    speculative = slots is not None and slots.ndim == 2
    if num_accepted is not None and not speculative:
        _fail(
            "num_accepted",
            "no slots" if slots is None else f"slots {slots.shape}",
            "given with slots [N, S] alone, a slot for each token of a row",
            "Speculative decoding keeps a state per token: pass a 2-D table, or leave "
            "num_accepted out.",
        )
    if slots is None and state.shape[0] != rows:
        _fail(
            "state",
            f"{state.shape[0]} states for {rows} rows",
            "one state per row where slots is None",
            f"Pass slots to use a pool ({source}).",
        )
    if slots is not None and (slots.ndim not in (1, 2) or slots.shape[0] != rows):
        wanted = f"[N] or, for speculative decoding, [N, S], with N = {rows}"
        _fail("slots", slots.shape, wanted, f"One entry a row: {source}.")
    if speculative:
        if num_accepted is None:
            _fail(
                "slots",
                slots.shape,
                "[N] where num_accepted is None",
                "Pass num_accepted [N] (ones at first), or one slot a row.",
            )
        if slots.shape[1] == 0:
            _fail("slots", slots.shape, "[N, S] with S >= 1", "S is 1 + drafts.")
        if tokens is not None and tokens > slots.shape[1]:
            _fail(
                "slots",
                f"{tokens} tokens a row for {slots.shape[1]} columns",
                "[N, S] with S >= T",
                "Each token's state needs a column; pack ragged rows with cu_seqlens.",
            )
    for name, x in dict(num_accepted=num_accepted, has_state=has_state).items():
        if x is not None and x.shape != (rows,):
            _fail(name, x.shape, f"[N] = ({rows},)", f"One entry a row: {source}.")
