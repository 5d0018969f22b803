"""Which tokens belong to which row of a batch, and which rows are null: one rule for
every op that keeps a state in slots."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gdn_jax import _types as t


class Batch(NamedTuple):
    """The tables of a call; those that were not given are None."""

    slots: t.Slots | None = None
    cu_seqlens: t.Boundaries | None = None
    num_accepted: t.Accepted | None = None
    has_state: t.HasState | None = None

    def num_rows(self, num_states: int) -> int:
        """Without tables each of so many states has a row."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        return num_states if self.slots is None else self.slots.shape[0]


class Rows(NamedTuple):
    """Which tokens rows own and where their states lie; of one row, or [N] of all.

    `read` is the slot a row starts from (0 where the row is null, so that it can be
    used as an index), `keeps_state` False where it starts from zeros instead.
    """

    number: Array
    begin: Array
    length: Array
    read: Array
    live: Array
    keeps_state: Array


def can_stand(accepted: Array, pending: Array, keeps_state: Array) -> Array:
    """Of a step whose convolution takes one token of the last step to stand: of those
    that are pending no more than there are, where a row goes on with its state."""
    upto = jnp.maximum(pending, 1)
    return ~keeps_state | ((accepted >= 1) & (accepted <= upto))


def find_rows(
    batch: Batch,
    number: Array,
    *,
    num_tokens: int,
    num_slots: int,
    tokens_per_row: int | None,
    columns: int,
    null_slot: int | None,
) -> Rows:
    """The null rule for the rows of these numbers: an array, or in a kernel, where
    `batch` holds references, one. `tokens_per_row` is None where `cu_seqlens` says;
    `columns` bounds num_accepted."""
    begin, length = find_tokens(batch, number, num_tokens, tokens_per_row)
    live = length > 0
    accepted = jnp.ones_like(number)
    if batch.num_accepted is not None:
        accepted = batch.num_accepted[number]
        live &= (accepted >= 1) & (accepted <= columns)
    if batch.slots is None:
        read = number
    elif len(batch.slots.shape) == 1:
        read = batch.slots[number]
    else:
        read = batch.slots[number, jnp.clip(accepted - 1, 0, columns - 1)]
    live &= is_live_slot(read, num_slots, null_slot)
    keeps = live if batch.has_state is None else live & batch.has_state[number]
    return Rows(number, begin, length, jnp.where(live, read, 0), live, keeps)


def in_call(number: Array, num_rows: int, is_packed: bool) -> Array:
    """Of a kernel's program, the row of the call that it may look at: rows of a grid
    are those, and behind packed ones another, which has the last's number.

    By a difference, since of two rows min(number, 1) is (number != 0) to LLVM, and a
    select between two constants to ptxas: short of registers, it makes one again from
    a predicate that has something else in it by then (seen of CUDA 13.0 and 13.5).
    """
    if not is_packed:
        return number if num_rows > 1 else jnp.zeros_like(number)
    return number - (number >= np.int32(num_rows)).astype(jnp.int32)


def find_tokens(
    batch: Batch, number: Array, num_tokens: int, tokens_per_row: int | None
) -> tuple[Array, Array]:
    """Where the tokens of these rows begin, and how many there are."""
    if tokens_per_row is not None:
        return number * tokens_per_row, jnp.full_like(number, tokens_per_row)
    begin = jnp.clip(batch.cu_seqlens[number], 0, num_tokens)
    end = jnp.clip(batch.cu_seqlens[number + 1], 0, num_tokens)
    return begin, jnp.maximum(end - begin, 0)


def find_owners(
    rows: Rows, num_tokens: int, tokens_per_row: int | None
) -> tuple[Array, Array, Array]:
    """For each token [L]: its row, its place in that row, whether it is live."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if tokens_per_row is not None:
        row = token // tokens_per_row
        return row, token - rows.begin[row], rows.live[row]
    # the row that begins last, at or before the token
    begin = jnp.where(rows.length > 0, rows.begin, num_tokens)
    begins = jnp.full(num_tokens, -1, jnp.int32).at[begin].max(rows.number, mode="drop")
    row = begins[lax.cummax(jnp.where(begins >= 0, token, 0))]
    is_behind, row = row >= 0, jnp.maximum(row, 0)
    place = token - rows.begin[row]
    return row, place, is_behind & (place < rows.length[row]) & rows.live[row]


def is_live_slot(slot: Array, num_slots: int, null_slot: int | None) -> Array:
    inside = (slot >= 0) & (slot < num_slots)
    return inside if null_slot is None else inside & (slot != null_slot)
