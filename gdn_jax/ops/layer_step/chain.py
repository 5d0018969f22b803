"""A layer's step as the ops it is made of, one after another."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.causal_conv1d.api import causal_conv1d
from gdn_jax.ops.gated_delta.api import fused_update
from gdn_jax.ops.gated_delta.replay_api import replay_update
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.gated_rms_norm.api import gated_rms_norm
from gdn_jax.ops.layer_step.call import Heads, Inputs, Options, Projected, Stepped
from gdn_jax.ops.tables import find_tables


def chain(x: Inputs, options: Options, implementation: str) -> Stepped:
    heads, rule, weights = options.heads, options.rule, x.weights
    lead = (x.num_tokens,)
    if rule.tokens_per_row is not None:
        lead = x.num_rows, rule.tokens_per_row
    dense = [y.reshape(*lead, y.shape[-1]) for y in x.projected]
    channels, z, b, a = apart(Projected(*dense), heads)
    tables = find_tables(x.tables, x.conv_slots, lead, x.pools(rule.null_slot))
    if tables.live is not None:  # out of a dead token is 0, whatever its gate
        z = jnp.where(tables.live[..., None, None], z, 0)
    conv, qkv = causal_conv1d(
        x.conv,
        channels,
        weights.conv,
        split=heads.split,
        implementation=implementation,
        **tables.conv,
    )
    q, k, v = (
        y.reshape(*lead, n, y.shape[-1] // n)
        for y, n in zip(qkv, (heads.H, heads.H, heads.HV), strict=True)
    )
    is_replay = isinstance(x.recurrent, ReplayState)
    recurrent, out = (replay_update if is_replay else fused_update)(
        x.recurrent,
        *(q, k, v),
        *(weights.A_log, a, b, weights.dt_bias),
        scale=rule.scale,
        qk_l2norm=rule.qk_l2norm,
        out_dtype=rule.out_dtype,
        implementation=implementation,
        **dataclasses.asdict(rule.gating),
        **tables.recurrent,
    )
    out = gated_rms_norm(
        out,
        z,
        weights.norm,
        eps=options.eps,
        activation=options.activation,
        implementation="xla",
    )
    out = out.reshape(x.num_tokens, heads.HV, heads.V).astype(z.dtype)
    return conv, recurrent, out


def apart(x: Projected, heads: Heads) -> tuple[Array, Array, Array, Array]:
    """channels [.. C], z [.. HV V], b and a [.. HV]."""
    lead = x.z.shape[:-1]
    per_value = (*lead, heads.HV, heads.V)
    if heads.apart:
        return x.qkv, x.z.reshape(per_value), x.b, x.a
    if not heads.interleaved:
        channels = sum(heads.split)
        z = x.z[..., channels:].reshape(per_value)
        return x.qkv[..., :channels], z, x.b[..., : heads.HV], x.a[..., heads.HV :]

    def per_key(y: Array) -> Array:
        return y.reshape(*lead, heads.H, y.shape[-1] // heads.H)

    ends = [heads.K, 2 * heads.K, 2 * heads.K + heads.group * heads.V]
    *qkv, z = jnp.split(per_key(x.qkv), ends, axis=-1)
    flat = [y.reshape(*lead, size) for y, size in zip(qkv, heads.split, strict=True)]
    channels = jnp.concatenate(flat, axis=-1)
    b, a = (y.reshape(*lead, heads.HV) for y in jnp.split(per_key(x.b), 2, axis=-1))
    return channels, z.reshape(per_value), b, a
