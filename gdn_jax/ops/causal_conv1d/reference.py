"""The oracle: every token gathers its W inputs, and stores its own where it is kept."""

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.batch import find_owners
from gdn_jax.ops.causal_conv1d.call import (
    ConvState,
    Inputs,
    Options,
    clear_history,
    find_columns,
    find_rows,
    split_channels,
)


def reference(inputs: Inputs, options: Options) -> tuple[ConvState, tuple[Array, ...]]:
    (buffer, start), width = inputs.state, inputs.weight.shape[1]
    num_slots, _, ring = buffer.shape
    num_tokens = inputs.x.shape[0]
    rows = find_rows(inputs, options)
    first, left = find_columns(inputs, rows)

    row, step, live = find_owners(rows, num_tokens, options.tokens_per_row)
    x = jnp.where(live[:, None], inputs.x, 0)

    def read(place: Array) -> Array:
        """[L C]: the input at a place of each token's row; negative: before the row."""
        here = x[jnp.clip(rows.begin[row] + place, 0, num_tokens - 1)]
        column = (first[row] + width - 1 + place) % ring
        before = buffer[rows.read[row], :, column]
        before = jnp.where(rows.keeps_state[row][:, None], before, 0)
        return jnp.where((place >= 0)[:, None], here, before).astype(jnp.float32)

    inputs_of = jnp.stack([read(step - width + 1 + w) for w in range(width)], -1)
    y = jnp.sum(inputs_of * inputs.weight.astype(jnp.float32), axis=-1)
    y = y if inputs.bias is None else y + inputs.bias.astype(jnp.float32)
    y = jax.nn.silu(y) if options.silu else y
    y = jnp.where(live[:, None], y, 0).astype(inputs.x.dtype)

    if inputs.tables.num_accepted is None:
        kept = live & (step >= rows.length[row] - width + 1)
    else:
        kept = live & (step < inputs.columns)
    slot = jnp.where(kept, rows.read[row], num_slots)
    column = (first[row] + width - 1 + step) % ring
    if inputs.tables.has_state is not None:
        buffer = clear_history(inputs, rows, first)
    buffer = buffer.at[slot, :, column].set(x.astype(buffer.dtype), mode="drop")
    slot = jnp.where(rows.live, rows.read, num_slots)
    state = ConvState(buffer, start.at[slot].set(left, mode="drop"))
    return state, split_channels(y, options)
