"""One call of the convolution in the form every implementation takes, and its state.

The state of a row is a ring of R = W - 1 + S columns. From `start` on it holds the
W - 1 inputs before the row's next token; the tokens of a step follow them:

    start            start + W - 1        (all mod R)
    | history, W - 1 | token 0 | token 1 | ...

A step with `num_accepted` a first moves `start` on by a - 1, past the tokens of the
last step that stand besides the one that always does. Then it keeps its tokens behind
the history and moves `start` on by one; a plain step moves it past all its tokens. So a
step of at most S tokens writes no column that it reads.

The kernel leaves `start` where it is and turns the columns under it; triton.py says
why. That is `turned`, of the same inputs in the same order.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from gdn_jax import _types as t
from gdn_jax.ops import batch, checks
from gdn_jax.ops.batch import Batch, Rows


class ConvState(NamedTuple):
    """The inputs that a causal convolution still needs, in slots.

    Attributes:
      buffer: [P, C, W - 1 + S], a ring of columns for each slot. S is 1, or 1 + drafts
        for speculative decoding.
      start: [P] int32 in [0, W - 1 + S), the column of the oldest input.
    """

    buffer: t.Ring
    start: t.Start

    @classmethod
    def zeros(cls, num_slots: int, channels: int, width: int, dtype, *, columns=1):
        """An empty state for `num_slots` sequences; `columns` is S."""
        _check_columns(columns)
        buffer = jnp.zeros((num_slots, channels, width - 1 + columns), dtype)
        return cls(buffer, jnp.zeros(num_slots, jnp.int32))

    @classmethod
    def from_dense(cls, history: Array, *, columns: int = 1) -> "ConvState":
        """From the last W - 1 inputs of each sequence, [P, C, W - 1], oldest first.
        Nothing here tells W: of a cache that keeps W of them, leave out the oldest."""
        _check_columns(columns)
        if jnp.ndim(history) != 3:
            remedy = "Channels come before the columns."
            checks.fail("history", jnp.shape(history), "[P, C, W - 1]", remedy)
        room = jnp.zeros((*history.shape[:2], columns), history.dtype)
        start = jnp.zeros(history.shape[0], jnp.int32)
        return cls(jnp.concatenate([history, room], axis=2), start)

    def to_dense(self, width: int, num_accepted: Array | None = None) -> Array:
        """[P, C, W - 1], the last inputs of each slot, oldest first. `width` is W, the
        filter's; `num_accepted` [P] as the next step would be given it, None: 1 after a
        speculative step."""
        ring = self.buffer.shape[2]
        if not 1 <= width <= ring:
            want = f"1 to {ring}, as the ring of W - 1 + S columns allows"
            checks.fail("width", width, want, "It is W of the weight [C, W].")
        first = self.start
        if num_accepted is not None:
            first += self._checked(num_accepted) - 1
        column = (first[:, None] + jnp.arange(width - 1)) % self.buffer.shape[2]
        return jnp.take_along_axis(self.buffer, column[:, None, :], axis=2)

    def _checked(self, num_accepted: Any) -> Array:
        num_accepted = checks.integers("num_accepted", num_accepted)
        if num_accepted.shape != self.start.shape:
            wanted = f"[P] = {self.start.shape}"
            remedy = "One a slot; of slots that are not asked for any number."
            checks.fail("num_accepted", num_accepted.shape, wanted, remedy)
        return num_accepted

    def turned(self, start: Array) -> "ConvState":
        """The same inputs in the same order, with the oldest at `start`."""
        column = jnp.arange(self.buffer.shape[2]) + (self.start - start)[:, None]
        column = (column % self.buffer.shape[2])[:, None, :]
        return ConvState(jnp.take_along_axis(self.buffer, column, axis=2), start)


def _check_columns(columns: Any) -> None:
    remedy = "It is S: 1, or 1 + drafts for speculative decoding."
    checks.count("columns", columns, remedy)


class Inputs(NamedTuple):
    """Tokens are packed: x [L C], all rows one after another."""

    state: ConvState
    x: t.Channels
    weight: t.Filter
    bias: t.PerChannel | None
    tables: Batch

    @property
    def num_rows(self) -> int:
        return self.tables.num_rows(self.state.start.shape[0])

    @property
    def columns(self) -> int:
        """S, the tokens of a speculative step that the ring has room for."""
        return self.state.buffer.shape[2] - self.weight.shape[1] + 1


@dataclasses.dataclass(frozen=True)
class Options:
    """`tokens_per_row` is None where `cu_seqlens` says which tokens are a row's.
    `split`: the channels of each array that y is returned in."""

    tokens_per_row: int | None
    null_slot: int | None
    silu: bool
    split: tuple[int, ...]


def find_rows(inputs: Inputs, options: Options, number: Array | None = None) -> Rows:
    """The null rule for all rows, or for one of that number."""
    if number is None:
        number = jnp.arange(inputs.num_rows, dtype=jnp.int32)
    return batch.find_rows(
        inputs.tables,
        number,
        num_tokens=inputs.x.shape[0],
        num_slots=inputs.state.start.shape[0],
        tokens_per_row=options.tokens_per_row,
        columns=inputs.columns,
        null_slot=options.null_slot,
    )


def split_channels(y: Array, options: Options) -> tuple[Array, ...]:
    ends = list(itertools.accumulate(options.split))
    return tuple(jnp.split(y, ends[:-1], axis=-1))


def find_columns(inputs: Inputs, rows: Rows) -> tuple[Array, Array]:
    """For each row: the column of its oldest input, and the `start` it leaves."""
    ring = inputs.state.buffer.shape[2]
    first, moved = inputs.state.start[rows.read], rows.length
    if inputs.tables.num_accepted is not None:
        first, moved = first + inputs.tables.num_accepted[rows.number] - 1, 1
    first = jnp.where(rows.keeps_state, first, 0) % ring
    return first, (first + moved) % ring


def clear_history(inputs: Inputs, rows: Rows, first: Array) -> Array:
    """The buffer, with zeros before the first token of rows that start afresh."""
    buffer, width = inputs.state.buffer, inputs.weight.shape[1]
    fresh = rows.live & ~rows.keeps_state
    slot = jnp.where(fresh, rows.read, buffer.shape[0])[:, None]
    column = (first[:, None] + jnp.arange(width - 1)) % buffer.shape[2]
    return buffer.at[slot, :, column].set(0, mode="drop")
