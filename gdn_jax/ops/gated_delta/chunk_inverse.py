"""(I + A)^-1 - I of a chunk's strict lower triangle A, inside a kernel.

By substitution in the diagonal blocks of 16, then in two turns, each from the inverses
of two neighbours that of both. A power series in A would not do: where keys repeat, its
terms grow to 1e17 and cancel.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gdn_jax import _triton
from gdn_jax.ops.blocks import MIN_DOT
from gdn_jax.ops.gated_delta.chunk_memory import Chunk
from gdn_jax.ops.gated_delta.chunk_parts import cut, dot

BLOCK = MIN_DOT


class Square(NamedTuple):
    """A chunk's [C C] in device memory, float32: A is replaced there by what it leads
    to, block by block, and every step takes the blocks in its own layout. Registers
    hold but few of them at a time, so that more programs fit beside each other."""

    ref: Any  # [HV L C]
    chunk: Chunk
    interpret: bool

    def load(self, row: Array, column: Array, wanted: Array | bool = True) -> Array:
        place, inside = self._at(row, column, wanted)
        return _triton.load(place, mask=inside, other=0)

    def store(
        self, row: Array, column: Array, value: Array, wanted: Array | bool = True
    ) -> None:
        """After every thread has loaded, and before any loads again."""
        place, inside = self._at(row, column, wanted)
        self._wait()
        _triton.store(place, value, mask=inside)
        self._wait()

    def _at(self, row: Array, column: Array, wanted: Array | bool) -> tuple[Any, Array]:
        row, column, wanted = jnp.broadcast_arrays(row, column, wanted)
        place = self.ref.at[self.chunk.head, self.chunk.begin + row, column]
        return place, wanted & (row < self.chunk.length)

    def _wait(self) -> None:
        if not self.interpret:
            _triton.barrier()


def invert(square: Square, parts: int) -> None:
    """In place."""
    _invert_blocks(square)
    width = BLOCK
    while width < square.ref.shape[2]:
        _merge(square, width, parts)
        width *= 2


def _range(n: int) -> Array:
    return jnp.arange(n, dtype=jnp.int32)


def _invert_blocks(square: Square) -> None:
    """Row i of a block's inverse X is that of I - A X, whose rows before i suffice."""
    blocks = square.ref.shape[2] // BLOCK
    shape = (blocks, BLOCK, BLOCK)
    begin = BLOCK * _range(blocks)[:, None, None]
    j, k = _range(BLOCK)[None, :, None], _range(BLOCK)[None, None, :]

    def load(i):
        return square.load(begin + i, jnp.broadcast_to(begin + k, shape), i < BLOCK)

    def substitute(i, carry):  # [block column row]
        inverse, a = carry
        following = load(i + 1)  # ahead of its turn: it takes longer than this one
        row = jnp.sum(a * inverse, axis=2)[:, :, None]  # zero from column i on
        return jnp.where(k == i, inverse - row, inverse), following

    identity = (j == k).astype(jnp.float32)
    carry = jnp.broadcast_to(identity, shape), load(jnp.int32(1))
    inverse, _ = lax.fori_loop(np.int32(1), np.int32(BLOCK), substitute, carry)
    square.store(begin + k, begin + j, inverse - identity)


def _merge(square: Square, width: int, parts: int) -> None:
    """Of every pair of blocks [[X 0] [A Y]] A becomes -(I + Y) A (I + X), for X and Y
    are inverses less I. Odd blocks' rows hold A and Y, in one product for all pairs."""
    C = square.ref.shape[2]
    pairs = C // (2 * width)
    row, column = _range(C)[:, None], _range(width)[None, :]
    pair, is_odd = row // (2 * width), row // width % 2 == 1
    begin = 2 * width * pair
    off = square.load(row, begin + column, is_odd)
    odd = square.load(row, begin + width + column, is_odd)
    beside = _range(pairs * width)[None, :]
    first = 2 * width * (beside // width)
    even = square.load(first + _range(width)[:, None], first + beside % width)

    def multiply(x, y):  # [C w], [w pairs w]
        products = dot(cut(x, parts), cut(y, parts)).reshape(C, pairs, width)
        own = _range(pairs)[None, :, None] == pair[:, :, None]
        return jnp.sum(jnp.where(own, products, 0.0), axis=1)

    passed = off + multiply(off, even)
    rows = passed.reshape(pairs, 2, width, width).sum(axis=1)
    rows = rows.transpose(1, 0, 2).reshape(width, pairs * width)
    square.store(row, begin + column, -(passed + multiply(odd, rows)), is_odd)
