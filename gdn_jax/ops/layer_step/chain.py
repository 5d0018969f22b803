"""A layer's step as the ops it is made of, one after another."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.causal_conv1d.api import causal_conv1d
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta.api import fused_update
from gdn_jax.ops.gated_rms_norm.api import gated_rms_norm
from gdn_jax.ops.layer_step.call import Heads, Projected, Weights
from gdn_jax.ops.tables import Tables


def chain(
    conv: ConvState,
    recurrent: Array,
    projected: Projected,
    weights: Weights,
    tables: Tables,
    heads: Heads,
    *,
    eps: float,
    activation: str,
    implementation: str | None,
    **rule: Any,
) -> tuple[ConvState, Array, Array]:
    """(conv, recurrent, out [.. HV V]); the arrays have the caller's axes."""
    channels, z, b, a = apart(projected, heads)
    if tables.live is not None:  # out of a dead token is 0, whatever its gate
        z = jnp.where(tables.live[..., None, None], z, 0)
    conv, qkv = causal_conv1d(
        conv,
        channels,
        weights.conv,
        split=heads.split,
        implementation=implementation,
        **tables.conv,
    )
    q, k, v = (
        x.reshape(*x.shape[:-1], n, x.shape[-1] // n)
        for x, n in zip(qkv, (heads.H, heads.H, heads.HV), strict=True)
    )
    recurrent, out = fused_update(
        recurrent,
        *(q, k, v),
        *(weights.A_log, a, b, weights.dt_bias),
        implementation=implementation,
        **tables.recurrent,
        **rule,
    )
    out = gated_rms_norm(
        out, z, weights.norm, eps=eps, activation=activation, implementation="xla"
    )
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
