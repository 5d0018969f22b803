"""The convolution batched over tokens in plain JAX: W shifted products, what the first
tokens of each row take from its state, and one scatter of what the state keeps."""

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.batch import Rows, find_owners
from gdn_jax.ops.causal_conv1d.call import (
    ConvState,
    Inputs,
    Options,
    clear_history,
    find_columns,
    find_rows,
    split_channels,
)


def xla(inputs: Inputs, options: Options) -> tuple[ConvState, tuple[Array, ...]]:
    width, num_tokens = inputs.weight.shape[1], inputs.x.shape[0]
    rows = find_rows(inputs, options)
    first, left = find_columns(inputs, rows)
    _, step, live = find_owners(rows, num_tokens, options.tokens_per_row)
    x = jnp.where(live[:, None], inputs.x, 0)
    weight = inputs.weight.astype(jnp.float32)

    y = jnp.zeros(x.shape, jnp.float32)
    for back in range(width):
        shifted = jnp.pad(x, ((back, 0), (0, 0)))[:num_tokens]
        shifted = jnp.where((step >= back)[:, None], shifted, 0).astype(jnp.float32)
        y = y + shifted * weight[:, width - 1 - back]
    y = _add_history(inputs, rows, first, weight, y)
    y = y if inputs.bias is None else y + inputs.bias.astype(jnp.float32)
    y = jax.nn.silu(y) if options.silu else y
    y = jnp.where(live[:, None], y, 0).astype(inputs.x.dtype)
    return _keep(inputs, rows, first, left, x), split_channels(y, options)


def _add_history(
    inputs: Inputs, rows: Rows, first: Array, weight: Array, y: Array
) -> Array:
    """Token t < W - 1 of a row takes W - 1 - t inputs from the row's state."""
    width, num_tokens = inputs.weight.shape[1], y.shape[0]
    ring = inputs.state.buffer.shape[2]
    column = (first[:, None] + jnp.arange(width - 1)) % ring  # [N W-1]
    history = inputs.state.buffer[rows.read[:, None], :, column]  # [N W-1 C]
    history = jnp.where(rows.keeps_state[:, None, None], history, 0)
    history = history.astype(jnp.float32)
    for step in range(width - 1):
        taken = sum(
            history[:, step + w] * weight[:, w] for w in range(width - 1 - step)
        )
        at = jnp.where(rows.live & (step < rows.length), rows.begin + step, num_tokens)
        y = y.at[at].add(taken, mode="drop")
    return y


def _keep(inputs: Inputs, rows: Rows, first: Array, left: Array, x: Array) -> ConvState:
    """A plain step keeps its last W - 1 tokens, a speculative one its first S."""
    (buffer, start), width = inputs.state, inputs.weight.shape[1]
    num_slots, _, ring = buffer.shape
    if inputs.tables.num_accepted is None:
        step = rows.length[:, None] - width + 1 + jnp.arange(width - 1)
    else:
        step = jnp.broadcast_to(
            jnp.arange(inputs.columns), (inputs.num_rows, inputs.columns)
        )
    kept = rows.live[:, None] & (step >= 0) & (step < rows.length[:, None])
    at = jnp.clip(rows.begin[:, None] + step, 0, max(x.shape[0] - 1, 0))
    slot = jnp.where(kept, rows.read[:, None], num_slots)
    column = (first[:, None] + width - 1 + step) % ring
    values = x[at].astype(buffer.dtype)  # [N kept C]
    if inputs.tables.has_state is not None:
        buffer = clear_history(inputs, rows, first)
    buffer = buffer.at[slot, :, column].set(values, mode="drop")
    slot = jnp.where(rows.live, rows.read, num_slots)
    return ConvState(buffer, start.at[slot].set(left, mode="drop"))
