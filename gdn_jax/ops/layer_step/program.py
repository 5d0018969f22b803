"""What a program of the fused step knows of its row, and does with a token."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import indices
from gdn_jax.ops.causal_conv1d.triton import MINUS_LOG2_E
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.gated_delta.triton import Store
from gdn_jax.ops.layer_step.call import Options
from gdn_jax.ops.layer_step.conv import Channels
from gdn_jax.ops.layer_step.tuning import LayerStepConfig


class Program(NamedTuple):
    """Attributes:
    steps: each token's place in the call.
    """

    x: Any
    options: Options
    config: LayerStepConfig
    head: Array
    part: Array
    row: Rows
    steps: list[Array]
    store: Store
    arithmetic: rule.Arithmetic

    @property
    def num_tiles(self) -> int:
        return self.config.tiles(self.options.heads.V)

    def tile(self, number: Any) -> Tile:
        """The `number`-th of this program's tiles."""
        number = self.part * np.int32(self.num_tiles) + number
        config = self.config.tile(self.options.heads.V)
        return Tile.of(self.x.recurrent, number, config)

    def load_state(self, tile: Tile) -> rule.Chunks:
        reads = self.row.live & self.row.keeps_state
        return tile.load_state(self.x.recurrent, reads, self.row.read, self.head)

    def prepare(self, q: rule.Chunks, k: rule.Chunks) -> rule.Token:
        scale, qk_l2norm = self.options.rule.scale, self.options.rule.qk_l2norm
        return rule.prepare(q, k, self.arithmetic, scale=scale, qk_l2norm=qk_l2norm)

    def update(
        self,
        tile: Tile,
        step: int,
        state: rule.Chunks,
        token: rule.Token,
        gates: tuple[Array, Array],
        v: Array,
    ) -> tuple[rule.Chunks, Array]:
        """The state, stored where each token's is, and out as an op of its own would
        round it."""
        state, out = rule.update(state, token, *gates, v, self.arithmetic)
        has = self.row.live & (step < self.row.length)
        target = self.store.target(np.int32(step))
        self.store.keep(tile, step, state, target, has)
        return state, out.astype(self.options.rule.out_dtype).astype(jnp.float32)

    def store_squares(self, squares_ref: Any, step: int, squares: Array) -> None:
        at = squares_ref.at[self.row.begin + step, self.head, self.part]
        has = None
        if self.options.rule.tokens_per_row is None:
            has = step < self.row.length
        _triton.store(at, jnp.where(self.row.live, squares, 0.0), mask=has)

    def store_out(self, step: int, v: Array, mask: Array | None, out: Array) -> None:
        """At `v` of the head, where the row has that token."""
        if self.options.rule.tokens_per_row is None:
            has = jnp.broadcast_to(step < self.row.length, out.shape)
            mask = has if mask is None else mask & has
        ref = self.store.out_ref
        at = ref.at[self.row.begin + step, self.head, v]
        _triton.store(at, out.astype(ref.dtype), mask=mask)


class Pieces(NamedTuple):
    """How channels of q, k and a part of v share an array [J M]: q and k have a piece
    each, v as many as it needs."""

    size: int
    counts: tuple[int, int, int]
    part: int

    @classmethod
    def of(cls, K: int, part: int) -> "Pieces":
        size = max(2, pl.next_power_of_2(K))  # of one Triton's compiler crashes
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


def in_chunks(y: Array, tile: Tile) -> rule.Chunks:
    """[K'], as a tile of state meets it."""
    lanes, each = tile.k[0].shape[3:]
    shape = (1, *tile.v.shape[1:4], each)
    y = y.reshape(-1, lanes, each).transpose(1, 2, 0)
    parts = lax.split(y, (1,) * y.shape[2], axis=2)[: len(tile.k)]
    return unpack(
        tuple(jnp.broadcast_to(part[..., 0][None, None, None], shape) for part in parts)
    )


class Gates(NamedTuple):
    """decays and betas [T], in lanes that have one each; of one token, of all lanes."""

    decay: Array
    beta: Array

    @classmethod
    def of(
        cls, x: Any, head: Array, steps: list[Array], options: Options, row: Rows
    ) -> "Gates":
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


class Norm(NamedTuple):
    """The gated norm of some of a head's rows: `v`, where `mask` says so."""

    v: Array
    mask: Array | None
    weight: Array
    gates: list[Array]

    @classmethod
    def load(cls, program: Program, v: Array, mask: Array | None) -> "Norm":
        x, first = program.x, program.options.heads.columns(program.head)[1]

        def load(ref: Any, *index: Any) -> Array:
            return _triton.load_where(ref.at[index], mask)

        gates = [load(x.projected.z, at, first + v) for at in program.steps]
        return cls(v, mask, load(x.weights.norm, v), gates)

    def store(
        self, program: Program, step: int, out: Array, scale: Array | None
    ) -> None:
        """`scale`: 1 / root mean square of the head's out; None where it comes later.
        Zeros of a null row."""
        out = out if scale is None else out * scale
        out = gated(out, self.weight, self.gates[step], program.options)
        out = jnp.where(program.row.live, out, 0.0)
        program.store_out(step, self.v, self.mask, out)


def gated(out: Array, weight: Array, z: Array, options: Options) -> Array:
    """What the norm multiplies by besides its scale."""
    z = z.astype(jnp.float32)
    gate = 1.0 / (1.0 + jnp.exp2(z * MINUS_LOG2_E))
    gate = z * gate if options.activation == "silu" else gate
    return out * weight.astype(jnp.float32) * gate


def sum_of_squares(parts: list[Array]) -> Array:
    """Of out [1 R W LV LK], of which all LK lanes hold the same."""
    squares = jnp.zeros(parts[0].shape[1:], jnp.float32)
    for part in parts:
        squares += jnp.sum(part * part, axis=0)
    # as many as a power of two, and so exact
    return jnp.sum(squares.ravel()) / np.float32(parts[0].shape[3])


def scale_of(squares: Array, options: Options) -> Array:
    """1 / the root of the mean, of a head's sum of squares."""
    mean = squares / np.float32(options.heads.V)
    return lax.rsqrt(mean + np.float32(options.eps))


def scaled(out: Array, squares: Array, options: Options) -> Array:
    """Out of heads that several programs have had parts of, each of which has left its
    own of `squares` [L HV parts]; in a launch of its own."""
    # by hand, since XLA has a launch of its own for a sum over an axis
    first, *others = (squares[..., part] for part in range(squares.shape[2]))
    total = sum(others, start=first)
    scale = scale_of(total, options)[..., None]
    if options.rule.tokens_per_row is not None:
        return out * scale
    # anything lies in `squares` of tokens that no row owns, whose out is 0
    return jnp.where(out == 0, 0, out * scale)
