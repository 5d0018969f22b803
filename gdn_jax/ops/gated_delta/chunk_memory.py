"""Where a chunk's tokens lie, and what kernels load and store of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops import ragged
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import padded
from gdn_jax.ops.gated_delta.call import Inputs, Options, find_rows
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut_array
from gdn_jax.ops.gated_delta.chunk_xla import CHUNK


def parts_of(options: Options) -> int:
    """Of what a state's error grows by: with beta up to 2, where nothing is forgotten
    and keys are alike, two would leave it at 1e-3 after a thousand tokens."""
    return 3 if options.gating.allow_neg_eigval else 2


class Keys(NamedTuple):
    """q and k in parts, [L H K] each."""

    q: Parts
    k: Parts

    @classmethod
    def of(cls, x: Inputs, options: Options) -> "Keys":
        return cls(*(cut_array(y, parts_of(options)) for y in (x.q, x.k)))


class Chunk(NamedTuple):
    """Of a row, for one value head. Of arrays over the tokens, [C n] are its own; what
    is loaded where it has no token is 0."""

    begin: Array
    length: Array
    token: Array  # [C]
    valid: Array  # [C]
    head: Array
    key_head: Array
    number: Array  # of its own, below `ragged.most_blocks`

    @classmethod
    def of(cls, x: Any, row: Rows, step: Array, head: Array, length: Array) -> "Chunk":
        place = jnp.arange(CHUNK, dtype=jnp.int32)
        begin = row.begin + step * CHUNK
        return cls(
            begin=begin,
            length=length,
            token=begin + place,
            valid=place < length,
            head=head,
            key_head=head // (x.v.shape[1] // x.k.shape[1]),
            # rows that begin in the same 64 tokens are told apart by their own numbers
            number=lax.div(row.begin, np.int32(CHUNK)) + row.number + step,
        )

    @classmethod
    def find(cls, x: Any, options: Options, head: Array, turn: Array) -> "Chunk":
        """Of all rows' chunks in turn; empty past the last."""
        row, step = _find_step(x, options, turn)
        found = find_rows(x, options, jnp.minimum(row, np.int32(x.num_rows - 1)))
        is_live = (row < x.num_rows) & found.live
        length = jnp.clip(found.length - step * CHUNK, 0, CHUNK)
        return cls.of(x, found, step, head, jnp.where(is_live, length, 0))

    def load_keys(self, refs: Any) -> Parts:
        """[C K] of [L H K]"""
        k = jnp.arange(padded(refs[0].shape[2]), dtype=jnp.int32)
        return self.load_parts(refs, k, self.key_head)

    def load_parts(self, refs: Any, column: Array, head: Array | None = None) -> Parts:
        return tuple(self.load(ref, column, head) for ref in refs)

    def load(self, ref: Any, column: Array, head: Array | None = None) -> Array:
        """[C n] of [L heads n]"""
        place, inside = self._rows(ref, column, self.head if head is None else head)
        return _triton.load(place, mask=inside, other=0)

    def store_parts(self, refs: Any, column: Array, parts: Parts) -> None:
        for ref, part in zip(refs, parts, strict=True):
            self.store(ref, column, part)

    def store(self, ref: Any, column: Array, value: Array) -> None:
        place, inside = self._rows(ref, column, self.head)
        _triton.store(place, value.astype(ref.dtype), mask=inside)

    def _rows(self, ref: Any, column: Array, head: Array) -> tuple[Any, Array]:
        place = ref.at[self.token[:, None], head, column[None, :]]
        return place, self.valid[:, None] & (column < ref.shape[2])[None, :]

    def load_factor(self, ref: Any) -> Array:
        """[C] of [HV L]"""
        place = ref.at[self.head, self.token]
        return _triton.load(place, mask=self.valid, other=0)

    def store_factor(self, ref: Any, value: Array, *part: Array) -> None:
        """[C] of [HV L], or of a part of [parts HV L]"""
        place = ref.at[(*part, self.head, self.token)]
        _triton.store(place, value, mask=self.valid)

    def load_square(self, refs: Any) -> Parts:
        """[C C] of [HV L C]"""
        place, inside = self._square()
        return tuple(_triton.load(ref.at[place], mask=inside, other=0) for ref in refs)

    def store_square(self, refs: Any, parts: Parts) -> None:
        place, inside = self._square()
        for ref, part in zip(refs, parts, strict=True):
            _triton.store(ref.at[place], part, mask=inside)

    def _square(self) -> tuple[Any, Array]:
        column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
        inside = jnp.broadcast_to(self.valid[:, None], (CHUNK, CHUNK))
        return (self.head, self.token[:, None], column), inside


def num_chunks(x: Any, options: Options) -> int:
    """As many as there can be."""
    if options.tokens_per_row is not None:
        return x.num_rows * pl.cdiv(options.tokens_per_row, CHUNK)
    return ragged.most_blocks(x.q.shape[0], x.num_rows, CHUNK)


def _find_step(x: Any, options: Options, turn: Array) -> tuple[Array, Array]:
    if options.tokens_per_row is None:
        return ragged.find_block(x.cu_seqlens, x.q.shape[0], CHUNK, turn)
    steps = np.int32(pl.cdiv(options.tokens_per_row, CHUNK))
    return lax.div(turn, steps), lax.rem(turn, steps)
