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

from gdn_jax.ops import checks
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    GateOptions,
    Gates,
    Inputs,
    Options,
)
from gdn_jax.ops.gated_delta.rounding import ROUNDINGS

AnyGates = TypeVar("AnyGates", GateLogits, Gates)


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
    state_rounding="nearest",
    rounding_key=None,
) -> tuple[Inputs, Options, Callable[[Array], Array]]:
    """(inputs, options, unpack): `unpack` gives a packed result the caller's axes."""
    state, q, k, v = (
        checks.floating(name, x) for name, x in dict(state=state, q=q, k=k, v=v).items()
    )
    tables = checks.tables(slots, cu_seqlens, num_accepted, has_state)
    _check_heads(state, q, k, v)
    _check_gates(gates, v.shape[:-1], state.shape[3])
    dense = q.ndim == 4
    rows, tokens, source = checks.rows_of(q.shape[: q.ndim - 2], tables.cu_seqlens)
    check_slots(state, tables, rows, tokens, source)
    null_slot = checks.null_slot_of(null_slot, state.shape[0], tables.slots)

    def packed(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:]) if dense else x

    def unpack(x: Array) -> Array:
        return x.reshape(*v.shape[:2], *x.shape[1:]) if dense else x

    arrays = dict(state=state, q=q, k=k, v=v) | gates._asdict() | tables._asdict()
    checks.check_sharding(arrays)
    per_token = {name: packed(getattr(gates, name)) for name in gates.PER_TOKEN}
    inputs = Inputs(
        state,
        packed(q),
        packed(k),
        packed(v),
        gates._replace(**per_token),
        *tables,
        rounding=rounding_words(state_rounding, rounding_key, state.dtype),
    )
    options = Options(
        tokens_per_row=tokens,
        scale=check_scale(scale, q.shape[-1]),
        qk_l2norm=checks.flag("qk_l2norm", qk_l2norm),
        null_slot=null_slot,
        per_token_states=checks.flag("per_token_states", per_token_states),
        out_dtype=checks.float_dtype(
            "out_dtype", v.dtype if out_dtype is None else out_dtype, "None: v's."
        ),
        gating=gating,
    )
    return inputs, options, unpack


def rounding_words(state_rounding: Any, key: Any, dtype: Any) -> Any:
    """A key's, [W] uint32; None where states are rounded to nearest."""
    if state_rounding not in ROUNDINGS:
        got, wanted = repr(state_rounding), f"one of {', '.join(ROUNDINGS)}"
        checks.fail("state_rounding", got, wanted, "It is of 16-bit states.")
    if state_rounding == "nearest":
        if key is not None:
            wanted = "None where state_rounding is 'nearest'"
            remedy = "Pass state_rounding='stochastic', or leave the key out."
            checks.fail("rounding_key", "a key", wanted, remedy)
        return None
    if dtype == jnp.float32:
        remedy = "A float32 state is stored as it is: nothing is rounded."
        got, wanted = "'stochastic' of a float32 state", "'nearest' of it"
        checks.fail("state_rounding", got, wanted, remedy)
    wanted = "a typed key where state_rounding is 'stochastic'"
    remedy = "Give each call another one: jax.random.fold_in(jax.random.key(0), step)."
    if not jnp.issubdtype(getattr(key, "dtype", object), jax.dtypes.prng_key):
        got = "None" if key is None else type(key).__name__
        checks.fail("rounding_key", got, wanted, remedy)
    if key.shape != ():
        checks.fail("rounding_key", f"keys {key.shape}", "one key", remedy)
    words: Any = key
    return jax.random.key_data(words).ravel()


def gate_options(
    softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
) -> GateOptions:
    beta = checks.number("softplus_beta", softplus_beta)
    if not (beta > 0 and math.isfinite(beta)):
        remedy = "1.0 is the plain softplus."
        checks.fail("softplus_beta", beta, "a finite number > 0", remedy)
    if gate_lower_bound is not None:
        gate_lower_bound = checks.number("gate_lower_bound", gate_lower_bound)
        if not (gate_lower_bound < 0 and math.isfinite(gate_lower_bound)):
            checks.fail(
                "gate_lower_bound",
                gate_lower_bound,
                "a finite number < 0",
                "It is the smallest log-decay; GLM and Kimi-K3 use -5.",
            )
    threshold = checks.number("softplus_threshold", softplus_threshold)
    if math.isnan(threshold):
        checks.fail("softplus_threshold", threshold, "a number", "20.0 is vLLM's.")
    doubled = checks.flag("allow_neg_eigval", allow_neg_eigval)
    return GateOptions(beta, threshold, doubled, gate_lower_bound)


def check_scale(scale: Any, K: int) -> float:
    if scale is None:
        return K**-0.5
    number = checks.number("scale", scale)
    if not 0 < number <= np.finfo(np.float32).max:
        checks.fail(
            "scale", scale, "a finite number > 0 in float32", "None takes K**-0.5."
        )
    return number


def _check_heads(state: Array, q: Array, k: Array, v: Array) -> None:
    if state.ndim != 4:
        checks.fail("state", state.shape, "[P or N, HV, V, K]", "Add the missing axes.")
    if q.ndim not in (3, 4):
        checks.fail(
            "q", q.shape, "[N, T, H, K] (dense) or [L, H, K] (packed)", "Reshape it."
        )
    if k.shape != q.shape:
        checks.fail(
            "k",
            k.shape,
            f"of q's shape {q.shape}",
            "Keys and queries have the same H heads; values may have more.",
        )
    if v.shape[:-2] != q.shape[:-2] or v.ndim != q.ndim:
        lead = "".join(f"{n}, " for n in q.shape[:-2])
        wanted = f"[{lead}HV, V], q's leading axes"
        remedy = "Pass the same tokens in q, k and v, heads after tokens: [N, T, H, K]."
        checks.fail("v", v.shape, wanted, remedy)
    heads, value_heads = q.shape[-2], v.shape[-2]
    if heads == 0 or value_heads % heads:
        checks.fail(
            "v",
            f"{value_heads} value heads over {heads} key heads",
            "of a multiple of the key heads (HV % H == 0)",
            "Value head i reads key head i // (HV // H); repeat or regroup heads.",
        )
    wanted = (value_heads, v.shape[-1], q.shape[-1])
    if state.shape[1:] != wanted:
        checks.fail(
            "state",
            state.shape,
            f"[P or N, HV, V, K] = [.., {', '.join(map(str, wanted))}]",
            "A [.., K, V] state needs swapaxes(-1, -2); heads come after tokens in q, "
            "k and v, [N, T, H, K].",
        )
    if 0 in wanted:
        axes = "[P or N, HV, V, K] with HV, V and K at least 1"
        checks.fail("state", state.shape, axes, "Only N, T, L and P may be 0.")


def floating_gates(kind: type[AnyGates], *given: Any) -> AnyGates:
    names = zip(kind._fields, given, strict=True)
    return kind(*(checks.floating(name, x) for name, x in names))


def check_gate_logits(logits: GateLogits) -> None:
    """The logits alone: b [.. HV] says how many value heads and tokens there are."""
    checks.check_sharding(logits._asdict())
    if logits.b.ndim == 0:
        checks.fail(
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
        checks.fail(beta_name, beta.shape, str(per_head), each)
    if decay.shape not in (per_head, (*per_head, K)):
        per_k = (*per_head, "K" if K is None else K)
        wanted = f"{per_head}, or {per_k} for one decay per K (KDA)"
        checks.fail(decay_name, decay.shape, wanted, each)
    if isinstance(gates, GateLogits):
        heads = per_head[-1:]
        if gates.A_log.shape != heads:
            checks.fail(
                "A_log", gates.A_log.shape, f"[HV] = {heads}", "It is per value head."
            )
        wanted = (*heads, K) if decay.ndim > beta.ndim else heads
        if gates.dt_bias.shape != wanted:
            remedy = "It carries a K axis exactly where `a` does (KDA)."
            checks.fail("dt_bias", gates.dt_bias.shape, str(wanted), remedy)


def check_slots(
    state: Array, tables: Batch, rows: int, tokens: int | None, source: str
) -> None:
    slots, num_accepted = tables.slots, tables.num_accepted
    speculative = slots is not None and slots.ndim == 2
    if num_accepted is not None and not speculative:
        checks.fail(
            "num_accepted",
            "no slots" if slots is None else f"slots {slots.shape}",
            "given with slots [N, S] alone, a slot for each token of a row",
            "Speculative decoding keeps a state per token: pass a 2-D table, or leave "
            "num_accepted out.",
        )
    if slots is None and state.shape[0] != rows:
        checks.fail(
            "state",
            f"{state.shape[0]} states for {rows} rows",
            "one state per row where slots is None",
            f"Pass slots to use a pool ({source}).",
        )
    if slots is not None and (slots.ndim not in (1, 2) or slots.shape[0] != rows):
        axes = "[N]" if num_accepted is None else "[N, S]"
        wanted = f"{axes} with N = {rows}"
        checks.fail("slots", slots.shape, wanted, f"One entry a row: {source}.")
    if speculative:
        if num_accepted is None:
            checks.fail(
                "slots",
                slots.shape,
                "[N] where num_accepted is None",
                "Pass num_accepted [N] (ones at first), or one slot a row.",
            )
        if slots.shape[1] == 0:
            checks.fail("slots", slots.shape, "[N, S] with S >= 1", "S is 1 + drafts.")
        if tokens is not None and tokens > slots.shape[1]:
            checks.fail(
                "slots",
                f"{tokens} tokens a row for {slots.shape[1]} columns",
                "[N, S] with S >= T",
                "Each token's state needs a column; pack ragged rows with cu_seqlens.",
            )
    checks.check_per_row(tables, rows, source)
