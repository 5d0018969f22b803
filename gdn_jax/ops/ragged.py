"""Which row a program works on where `cu_seqlens` says how long they are, and the
tokens that belong to none."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gdn_jax import _triton

ROWS_AT_ONCE = 512  # of cu_seqlens, in the registers of one warp
PAIRS_AT_ONCE = 2048  # of a token and a row, likewise


class Found(NamedTuple):
    """Past the last row's blocks, `row` is the number of rows."""

    row: Array
    block: Array


def most_blocks(num_tokens: int, num_rows: int, size: int) -> int:
    """However the rows share the tokens out: each fills all its blocks but one."""
    return num_tokens // size + num_rows


def find_block(cu_seqlens: Any, num_tokens: int, size: int, number: Array) -> Found:
    """Blocks of `size` tokens are numbered through, row after row."""
    num_rows = cu_seqlens.shape[0] - 1
    turns, lanes = _turns(num_rows, ROWS_AT_ONCE)

    def look(turn, carry):
        passed, before, skipped = carry
        begin, end = _load(cu_seqlens, turn * np.int32(lanes), lanes, num_tokens)
        blocks = (jnp.maximum(end - begin, 0) + np.int32(size - 1)) // np.int32(size)
        until = passed + jnp.cumsum(blocks, dtype=jnp.int32)
        is_before = until <= number
        before += jnp.sum(is_before, dtype=jnp.int32)
        skipped = jnp.maximum(skipped, jnp.max(jnp.where(is_before, until, 0)))
        return passed + jnp.sum(blocks, dtype=jnp.int32), before, skipped

    zero = jnp.int32(0)
    _, before, skipped = lax.fori_loop(
        np.int32(0), np.int32(turns), look, (zero, zero, zero)
    )
    return Found(jnp.minimum(before, np.int32(num_rows)), number - skipped)


def surely_owned(
    cu_seqlens: Any, num_tokens: int, size: int, first: Array | int
) -> Array:
    """Whether boundaries rise from before a block of `size` tokens, of those that there
    are, to past it: then rows own them all. It takes no loop over the rows."""
    num_rows = cu_seqlens.shape[0] - 1
    from_before = cu_seqlens[0] <= first
    to_past = cu_seqlens[num_rows] >= jnp.minimum(first + size, num_tokens)
    return from_before & to_past


def is_owned(cu_seqlens: Any, token: Array) -> Array:
    """int32: 1 if a row owns the token, one that there is."""
    turns, lanes = _turns(cu_seqlens.shape[0] - 1, ROWS_AT_ONCE)

    def look(turn, owned):
        begin, end = _load(cu_seqlens, turn * np.int32(lanes), lanes)
        here = (begin <= token) & (token < end)  # [rows]
        return jnp.maximum(owned, jnp.max(here.astype(jnp.int32)))

    return lax.fori_loop(np.int32(0), np.int32(turns), look, jnp.int32(0))


def are_owned(cu_seqlens: Any, num_tokens: int, token: Array) -> Array:
    """The same of several tokens, [tokens]; those past the last are owned by none."""
    turns, lanes = _turns(cu_seqlens.shape[0] - 1, max(1, PAIRS_AT_ONCE // token.size))

    def look(turn, owned):
        first = turn * np.int32(lanes)
        begin, end = _load(cu_seqlens, first, lanes, num_tokens)
        here = (begin <= token[:, None]) & (token[:, None] < end)  # [tokens rows]
        return jnp.maximum(owned, jnp.max(here.astype(jnp.int32), axis=1))

    owned = jnp.zeros(token.size, jnp.int32)
    return lax.fori_loop(np.int32(0), np.int32(turns), look, owned)


def _turns(num_rows: int, most: int) -> tuple[int, int]:
    lanes = min(1 << (num_rows - 1).bit_length(), most)
    return -(-num_rows // lanes), lanes


def _load(
    cu_seqlens: Any, first: Array, lanes: int, most: int | None = None
) -> tuple[Array, Array]:
    """Where rows begin and end, from the first on, clipped to [0, most] where that is
    given; those past the last are empty."""
    row = first + jnp.arange(lanes, dtype=jnp.int32)
    is_row = row < cu_seqlens.shape[0] - 1

    def load(at: Array) -> Array:
        loaded = _triton.load(cu_seqlens.at[at], mask=is_row, other=0)
        return loaded if most is None else jnp.clip(loaded, 0, most)

    return load(row), load(row + 1)
