"""The convolution as one Pallas kernel (Triton lowering), and its launch.

A program walks a block of one row's tokens, for a block of channels, with the last
W - 1 inputs in registers.

No reader meets a writer. Of a row's programs for a block of channels, the one with the
row's first tokens alone reads and writes what the state holds of those channels. The
others take the inputs before their own from `x`, which nobody writes; so that they find
W - 1 there, a row's blocks are no shorter where it has several. Within the one program
a lane stores what it loaded itself or what reached it over a barrier behind all loads,
as whole rings are stored, selected from whole rings. `start` is read by all programs
of a row, and none can tell when the last one has: so the kernel never writes it, and
turns the ring under it instead, so that the oldest input is where `start` says again.
That rewrites columns that could have stayed, all of them in sectors that are written
anyway. It holds for plain and speculative steps alike, however long.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops import ragged
from gdn_jax.ops.batch import Rows, in_call
from gdn_jax.ops.causal_conv1d.call import (
    ConvState,
    Inputs,
    Options,
    find_columns,
    find_rows,
)
from gdn_jax.ops.causal_conv1d.channels import Channels, Columns, Values
from gdn_jax.ops.causal_conv1d.tuning import ConvConfig

MINUS_LOG2_E = -math.log2(math.e)  # GPUs have exp2; exp costs 6 instructions more

MultiplyAdd: TypeAlias = Callable[[Array, Array, Array], Array]


def conv_kernel(
    x: Any, buffer_ref, *y_refs, options: Options, config: ConvConfig, interpret: bool
) -> None:
    """`x` is `Inputs` of references. Grid: (blocks of channels, blocks of tokens)."""
    number = pl.program_id(1)
    channels = Channels.of(x.weight.shape[0], pl.program_id(0), config)
    row, block = _find_work(x, options, config, number)
    step = block * config.tokens
    owns_state = row.live & (block == 0)

    # All loads before any work: what is in flight decides the speed.
    ring = channels.load_columns(x.state.buffer, owns_state, row.read)
    most = options.tokens_per_row
    one_block = most is not None and most <= config.tokens
    window = None if one_block else _load_before(x, channels, row, step)
    weight = channels.load_columns(x.weight, row.live)
    bias = channels.zeros() if x.bias is None else channels.load(x.bias, row.live)
    kept = _load_kept(x, channels, row, owns_state)

    history, ring = _move_on(x, options, row, ring, kept)
    channels.store_columns(buffer_ref, ring, owns_state, row.read)
    window = history if window is None else _select(block == 0, history, window)
    convolve = functools.partial(
        _convolve,
        weight=_float(weight),
        bias=_float(bias),
        silu=options.silu,
        multiply_add=(lambda x, y, z: x * y + z) if interpret else _triton.multiply_add,
    )
    _walk(x, y_refs, channels, row, step, config, window, convolve)
    if x.tables.cu_seqlens is not None:
        cu_seqlens = x.tables.cu_seqlens
        _clear_unowned(cu_seqlens, y_refs, channels, number, config.tokens)


def _find_work(
    x: Any, options: Options, config: ConvConfig, number: Array
) -> tuple[Rows, Array]:
    """The row of the `number`-th block, and which of the row's blocks it is."""
    if options.tokens_per_row is not None:
        each = np.int32(pl.cdiv(options.tokens_per_row, config.tokens))
        return find_rows(x, options, lax.div(number, each)), lax.rem(number, each)
    cu_seqlens, num_tokens = x.tables.cu_seqlens, x.x.shape[0]
    row, block = ragged.find_block(cu_seqlens, num_tokens, config.tokens, number)
    is_row = row < x.num_rows
    row = find_rows(x, options, in_call(row, x.num_rows, is_packed=True))
    length = jnp.where(is_row, row.length, 0)
    return row._replace(length=length, live=row.live & is_row), block


def _load_before(x: Any, channels: Channels, row: Rows, step: Array) -> Columns:
    """The W - 1 inputs before a block that is not its row's first."""
    back, wanted = x.weight.shape[1] - 1, row.live & (step > 0)
    at = [row.begin + step - back + i for i in range(back)]
    return _float(tuple(channels.load(x.x, wanted, token) for token in at))


class _Kept(NamedTuple):
    """A token that the state keeps, and its column once the ring has moved on."""

    column: int
    exists: Array
    token: Values


def _load_kept(
    x: Any, channels: Channels, row: Rows, wanted: Array
) -> tuple[_Kept, ...]:
    """A plain step keeps its last W - 1 tokens, a speculative one its first S."""
    back, ring = x.weight.shape[1] - 1, x.state.buffer.shape[2]
    if x.tables.num_accepted is None:
        steps = {i: row.length - back + i for i in range(back)}
    else:
        steps = {(back - 1 + i) % ring: jnp.int32(i) for i in range(x.columns)}

    def load(column: int, step: Array) -> _Kept:
        exists = (step >= 0) & (step < row.length)
        token = channels.load(x.x, wanted & exists, row.begin + step)
        dtype = x.state.buffer.dtype
        return _Kept(column, exists, tuple(value.astype(dtype) for value in token))

    return tuple(load(*item) for item in steps.items())


def _move_on(
    x: Any, options: Options, row: Rows, ring: Columns, kept: tuple[_Kept, ...]
) -> tuple[Columns, Columns]:
    """(the W - 1 inputs before the row's first token, the ring as it is stored)."""
    back, size = x.weight.shape[1] - 1, len(ring)
    ring = _turn(ring, find_columns(x, row)[0])
    history = ring[:back]
    if x.tables.has_state is not None:
        zeros = jax.tree.map(jnp.zeros_like, history)
        history = _select(row.keeps_state, history, zeros)
    moved = options.tokens_per_row if x.tables.num_accepted is None else 1
    moved = row.length if moved is None else moved
    columns = list(_turn(history + ring[back:], moved % size))
    for column, exists, token in kept:
        columns[column] = _select(exists, token, columns[column])
    start = jnp.remainder(x.state.start[row.read], np.int32(size))
    return _float(history), _turn(tuple(columns), (size - start) % size)


def _turn(ring: Columns, by: Array | int) -> Columns:
    """Column `(i + by) % R` as column i, `by` in [0, R)."""
    size = len(ring)
    if isinstance(by, int):
        return ring[by:] + ring[:by]
    for bit in range((size - 1).bit_length()):
        moved = ring[1 << bit :] + ring[: 1 << bit]
        ring = _select((by >> bit) & 1 == 1, moved, ring)
    return ring


def _walk(
    x: Any,
    y_refs,
    channels: Channels,
    row: Rows,
    step: Array,
    config: ConvConfig,
    window: Columns,
    convolve: Callable[[Columns], Values],
) -> None:
    """From `step` on to the end of the block or of the row. A dead row has loaded
    nothing but zeros, so its y are zeros."""

    def take(turn, window):
        first = step + turn * np.int32(config.ahead)
        steps = [first + i for i in range(config.ahead)]
        tokens = [
            channels.load(x.x, row.live & (at < row.length), row.begin + at)
            for at in steps
        ]
        for at, token in zip(steps, tokens, strict=True):
            window = (*window, _float(token))
            y = convolve(window)
            channels.store(y_refs, y, at < row.length, row.begin + at)
            window = window[1:]
        return window

    if config.tokens == config.ahead:
        take(np.int32(0), window)
    else:
        left = jnp.minimum(row.length - step, np.int32(config.tokens))
        turns = (left + np.int32(config.ahead - 1)) // np.int32(config.ahead)
        lax.fori_loop(np.int32(0), turns, take, window)


def _convolve(
    window: Columns,
    *,
    weight: Columns,
    bias: Values,
    silu: bool,
    multiply_add: MultiplyAdd,
) -> Values:
    def convolve_channel(y: Array, *pairs: tuple[Array, Array]) -> Array:
        for tap, value in pairs:
            y = multiply_add(tap, value, y)
        return y / (1.0 + jnp.exp2(y * MINUS_LOG2_E)) if silu else y

    pairs = (zip(*columns, strict=True) for columns in zip(weight, window, strict=True))
    return tuple(map(convolve_channel, bias, *pairs))


def _select(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


def _float(values: Any) -> Any:
    return jax.tree.map(lambda value: value.astype(jnp.float32), values)


def _clear_unowned(
    cu_seqlens: Any, y_refs, channels: Channels, number: Array, size: int
) -> None:
    """Zeros for those of the `number`-th `size` packed tokens that no row owns."""
    num_tokens, first = y_refs[0].shape[0], number * size
    surely_owned = ragged.surely_owned(cu_seqlens, num_tokens, size, first)

    @pl.when(~surely_owned & (first < num_tokens))
    def _():
        place = jnp.arange(size, dtype=jnp.int32)
        owned = ragged.are_owned(cu_seqlens, num_tokens, first + place)

        def clear(i, _):
            is_owned = jnp.max(jnp.where(place == i, owned, 0)) > 0
            wanted = ~is_owned & (first + i < num_tokens)
            channels.store(y_refs, channels.zeros(), wanted, first + i)

        lax.fori_loop(0, size, clear, None)


def triton(
    x: Inputs, options: Options, config: ConvConfig, *, interpret: bool = False
) -> tuple[ConvState, tuple[Array, ...]]:
    """One launch; the buffer is aliased in place and `start` is as it was."""
    num_tokens, num_channels = x.x.shape
    if options.tokens_per_row is None:
        count = ragged.most_blocks(num_tokens, x.num_rows, config.tokens)
    else:
        count = x.num_rows * pl.cdiv(options.tokens_per_row, config.tokens)
    buffer, *parts = _triton.launch(
        functools.partial(
            conv_kernel, options=options, config=config, interpret=interpret
        ),
        x,
        (
            (x.state.buffer.shape, x.state.buffer.dtype),
            *(((num_tokens, size), x.x.dtype) for size in options.split),
        ),
        grid=(pl.cdiv(num_channels, config.channels), count),
        aliases={0: 0},  # the buffer is the first leaf of Inputs
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return ConvState(buffer, x.state.start), tuple(parts)
