"""A layer's step as one Pallas kernel (Triton lowering), and its launch.

A program owns a value head of a row, or a part of one. It convolves the head's channels
and those of the key head that it reads, walks the head's state tile by tile as
`fused_update`'s programs do, and, where it has the whole head, normalises what came
out: nothing but states and the result leaves registers.

A channel is convolved by one lane, while a value of q or k meets the state in many. So
the two have shapes of their own, and Triton brings values from one to the other through
shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import indices
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Inputs as RuleInputs
from gdn_jax.ops.gated_delta.clearing import clear, clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.gated_delta.triton import Store
from gdn_jax.ops.gated_delta.tuning import check_registers
from gdn_jax.ops.gated_rms_norm.api import gated_rms_norm
from gdn_jax.ops.layer_step.call import Inputs, Options, find_rows
from gdn_jax.ops.layer_step.chain import apart
from gdn_jax.ops.layer_step.conv import MINUS_LOG2_E, Channels, Convolution, Ring
from gdn_jax.ops.layer_step.tuning import LayerStepConfig


def layer_step_kernel(
    x: Any,
    buffer_ref,
    start_ref,
    new_ref,
    out_ref,
    *,
    options: Options,
    config: LayerStepConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references. Grid: (parts of V, value heads, rows); with
    `cu_seqlens` one row more, whose programs clear the tokens that belong to no row."""
    part, head, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, is_row = options.heads, number < x.num_rows
    number = jnp.minimum(number, np.int32(x.num_rows - 1))
    row, conv_row = (
        each._replace(live=each.live & is_row, length=jnp.where(is_row, each.length, 0))
        for each in find_rows(x, options, number)
    )
    multiply_add = (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add
    count = config.tiles(heads.V)
    tiles = [
        Tile.of(x.recurrent, part * np.int32(count) + np.int32(i), config.tile(heads.V))
        for i in range(count)
    ]
    steps = [row.begin + step for step in range(options.steps(x))]
    steps = [jnp.minimum(at, np.int32(x.num_tokens - 1)) for at in steps]

    # All loads before any work, what takes longest first.
    reads = row.live & row.keeps_state
    following = tiles[0].load_state(x.recurrent, reads, row.read, head)
    load = functools.partial(Convolution.load, x, conv_row, tokens=steps)
    pieces = Pieces.of(heads.K, count * config.block_v)
    convolution = load(pieces.channels(heads, head, part))
    norms = []
    if config.programs == 1:
        first_z = heads.columns(head)[1]
        norms = [_Norm.load(x, tile, first_z, steps) for tile in tiles]
    gates = _Gates.of(x, head, steps, options, row)

    ring = Ring.of(x, conv_row)
    qkv = convolution.run(ring, x.projected.z.dtype, multiply_add)
    if not interpret:
        _triton.barrier()  # all warps have read `start`
    program = head * np.int32(config.programs) + part
    ring.move(start_ref, program, heads.HV * config.programs)
    convolution.keep(buffer_ref, ring)

    arithmetic = rule.Arithmetic(tiles[0].sum_k, multiply_add)
    # of the rule's inputs it needs those that say where states are
    none: Any = None
    states = RuleInputs(x.recurrent, none, none, out_ref, none, *x.tables)
    store = Store(states, new_ref, out_ref, head, row, options.rule)
    outs: list[list[Array]] = [[] for _ in steps]
    for i, tile in enumerate(tiles):
        state = unpack(following)
        if i + 1 < len(tiles):
            following = tiles[i + 1].load_state(x.recurrent, reads, row.read, head)
        for step in range(len(steps)):
            q, k, v = pieces.take(qkv[step])
            token = _prepare(q, k, tile, arithmetic, options)
            now = _in_tiles(v, tile, len(tiles))[i]
            now = jnp.broadcast_to(now, tile.v.shape).astype(jnp.float32)
            decay, beta = gates.of_step(step)
            state, out = rule.update(state, token, decay, beta, now, arithmetic)
            outs[step].append(out.astype(options.rule.out_dtype).astype(jnp.float32))
            has = row.live & (step < row.length)
            store.keep(tile, step, state, store.target(np.int32(step)), has)
        store.end(tile, state)

    for step, parts in enumerate(outs):
        if norms:
            scale = _scale(parts, options)
            parts = [
                norm.apply(y * scale, step, options)
                for norm, y in zip(norms, parts, strict=True)
            ]
        for tile, y in zip(tiles, parts, strict=True):
            _store_out(out_ref, tile, y, step, head, row, options)

    if x.tables.cu_seqlens is not None:
        known = np.int32(len(steps))  # rows that are longer are null
        rest = jnp.maximum(row.length - known, 0)
        for tile in tiles:
            begin = row.begin + known
            clear(new_ref, out_ref, begin, rest, head, tile, options.rule)
        of_call = (
            program,
            heads.HV * config.programs,
            config.tile(heads.V),
            options.rule,
        )
        pl.when(~is_row)(lambda: clear_unowned(states, new_ref, out_ref, *of_call))


class Pieces(NamedTuple):
    """How channels of q, k and a part of v share an array [J M]: q and k have a piece
    each, v as many as it needs."""

    size: int
    counts: tuple[int, int, int]
    part: int

    @classmethod
    def of(cls, K: int, part: int) -> "Pieces":
        size = pl.next_power_of_2(K)
        return cls(size, (1, 1, max(1, pl.next_power_of_2(part) // size)), part)

    def channels(self, heads: Any, head: Array, part: Array) -> Channels:
        piece = indices(pl.next_power_of_2(sum(self.counts)))[:, None]
        place = indices(self.size)[None, :]
        first, (in_first, _) = heads.channels(head), heads.columns(head)
        channel = column = jnp.zeros((piece.size, self.size), jnp.int32)
        mask, wanted = channel > 0, channel > 0
        begin, sizes = 0, (heads.K, heads.K, heads.V)
        is_first = heads.is_first(head) & (part == 0)
        for i, (count, size) in enumerate(zip(self.counts, sizes, strict=True)):
            is_it = (piece >= begin) & (piece < begin + count)
            number = place * np.int32(count) + piece - np.int32(begin)
            if i == 2:
                is_it &= number < self.part
                number += part * np.int32(self.part)
            channel = jnp.where(is_it, first[i] + number, channel)
            column = jnp.where(is_it, in_first[i] + number, column)
            has = is_it & (number < size)
            mask |= has
            wanted |= has & is_first if i < 2 else has
            begin += count
        return Channels(channel, column, mask, wanted)

    def take(self, x: Array) -> list[Array]:
        """q and k [K'], and v of some size, its part first."""
        parts = lax.split(x.T, (1,) * x.shape[0], axis=1)
        parts, taken = iter([part[:, 0] for part in parts]), []
        for count in self.counts:
            mine = [next(parts) for _ in range(count)]
            taken.append(_triton.join(mine).ravel() if count > 1 else mine[0])
        return taken


def _prepare(
    q: Array, k: Array, tile: Tile, arithmetic: rule.Arithmetic, options: Options
) -> rule.Token:
    return rule.prepare(
        unpack(_in_chunks(q, tile)),
        unpack(_in_chunks(k, tile)),
        arithmetic,
        scale=options.rule.scale,
        qk_l2norm=options.rule.qk_l2norm,
    )


def _in_chunks(y: Array, tile: Tile) -> tuple[Array, ...]:
    """[K'] -> C of [1 W LV LK E]"""
    lanes, each = tile.k[0].shape[3:]
    shape = (1, *tile.v.shape[1:4], each)
    y = y.reshape(-1, lanes, each).transpose(1, 2, 0)
    parts = lax.split(y, (1,) * y.shape[2], axis=2)[: len(tile.k)]
    return tuple(
        jnp.broadcast_to(part[..., 0][None, None, None], shape) for part in parts
    )


def _in_tiles(y: Array, tile: Tile, tiles: int) -> list[Array]:
    """v as `Pieces.take` has it -> of each tile [R W LV 1 1]"""
    rows, warps, lanes = tile.row.shape[:3]
    y = y.reshape(-1, warps, lanes, rows).transpose(3, 1, 2, 0)
    parts = lax.split(y, (1,) * y.shape[3], axis=3)[:tiles]
    return [part[..., None] for part in parts]


class _Gates(NamedTuple):
    """decays and betas [T], in lanes that have one each; of one token, of all lanes."""

    decay: Array
    beta: Array

    @classmethod
    def of(
        cls, x: Any, head: Array, steps: list[Array], options: Options, row: Rows
    ) -> "_Gates":
        """A step that the row does not have leaves a state as it is."""
        weights, gating = x.weights, options.rule.gating
        in_b, in_a = options.heads.gates(head)
        count = pl.next_power_of_2(len(steps))
        member = indices(count) if count > 1 else np.int32(0)
        at = jnp.minimum(row.begin + member, np.int32(x.num_tokens - 1))
        a, b, A_log, dt_bias = (
            value.astype(jnp.float32)
            for value in (
                x.projected.a[at, in_a],
                x.projected.b[at, in_b],
                weights.A_log[head],
                weights.dt_bias[head],
            )
        )
        decay = rule.log_decay(A_log, a, dt_bias, gating, rule.QUICK)
        decay, beta = rule.QUICK.exp(decay), rule.beta(b, gating, rule.QUICK)
        if x.tables.cu_seqlens is not None:
            has = member < row.length
            decay, beta = jnp.where(has, decay, 1.0), jnp.where(has, beta, 0.0)
        return cls(decay, beta)

    def of_step(self, step: int) -> tuple[Array, Array]:
        if not self.decay.shape:
            return self
        is_it = indices(self.decay.size) == step
        decay, beta = (jnp.sum(jnp.where(is_it, each, 0.0)) for each in self)
        return decay, beta


class _Norm(NamedTuple):
    """The gated norm of a tile's part of a value head."""

    tile: Tile
    weight: Array
    gates: list[Array]

    @classmethod
    def load(cls, x: Any, tile: Tile, first: Array, steps: list[Array]) -> "_Norm":
        def load(ref: Any, *index: Any) -> Array:
            return _triton.load_where(ref.at[index], tile.in_v)

        gates = [load(x.projected.z, at, first + tile.v) for at in steps]
        return cls(tile, load(x.weights.norm, tile.v), gates)

    def apply(self, out: Array, step: int, options: Options) -> Array:
        z = self.gates[step].astype(jnp.float32)
        gate = 1.0 / (1.0 + jnp.exp2(z * MINUS_LOG2_E))
        gate = z * gate if options.activation == "silu" else gate
        return out * self.weight.astype(jnp.float32) * gate


def _scale(parts: list[Array], options: Options) -> Array:
    """1 / the root mean square of a head's out, whose tiles these are."""
    squares = jnp.zeros(parts[0].shape[1:])
    for part in parts:
        squares += jnp.sum(part * part, axis=0)
    # lanes that hold some of a row all have its out: as many as a power of two
    count = np.float32(options.heads.V * parts[0].shape[3])
    return lax.rsqrt(jnp.sum(squares.ravel()) / count + np.float32(options.eps))


def _store_out(
    out_ref: Any,
    tile: Tile,
    out: Array,
    step: int,
    head: Array,
    row: Rows,
    options: Options,
) -> None:
    """Zeros for a null row."""
    out, mask = jnp.where(row.live, out, 0.0), tile.in_v
    if options.rule.tokens_per_row is None:
        has = jnp.broadcast_to(step < row.length, out.shape)
        mask = has if mask is None else mask & has
    at = out_ref.at[row.begin + step, head, tile.v]
    _triton.store(at, out.astype(out_ref.dtype), mask=mask)


def _normalised(x: Inputs, out: Array, options: Options) -> Array:
    """In a launch of its own. Out of a null row stays 0, whatever z is."""
    _, z, _, _ = apart(x.projected, options.heads)
    y = gated_rms_norm(
        out,
        z,
        x.weights.norm,
        eps=options.eps,
        activation=options.activation,
        implementation="xla",
    )
    return jnp.where(out == 0, 0, y)


def triton(
    x: Inputs, options: Options, config: LayerStepConfig, *, interpret: bool = False
) -> tuple[ConvState, Array, Array]:
    """(conv, recurrent, out [L HV V]), in one launch, or two where several programs
    share out a head; both states in place."""
    heads = options.heads
    if not interpret:
        check_registers(config, heads.K, min(2, config.tiles(heads.V)))
    dtype, is_whole = x.projected.z.dtype, config.programs == 1
    written_dtype = dtype if is_whole else options.rule.out_dtype
    out = (x.num_tokens, heads.HV, heads.V), written_dtype
    written = (x.conv.buffer, x.conv.start, x.recurrent)
    rows = x.num_rows + (x.tables.cu_seqlens is not None)
    buffer, start, recurrent, out = _triton.launch(
        functools.partial(
            layer_step_kernel, options=options, config=config, interpret=interpret
        ),
        x,
        (*((y.shape, y.dtype) for y in written), out),
        grid=(config.programs, heads.HV, rows),
        aliases={0: 0, 1: 1, 2: 2},
        num_warps=config.num_warps,
        interpret=interpret,
    )
    if not is_whole:
        out = _normalised(x, out, options).astype(dtype)
    return ConvState(buffer, start), recurrent, out
