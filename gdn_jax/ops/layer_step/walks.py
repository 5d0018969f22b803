"""How a program walks over its tiles of a head's state.

`Held` has v and out of all of them in registers. `Streamed` has them in out's own
memory and so needs registers for two tiles alone: a warp or two walk over a whole head,
and no warp waits for many others. That is faster where there are more heads than a GPU
works on at once, slower where there are few.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.layer_step.conv import Channels, Convolution, Ring
from gdn_jax.ops.layer_step.program import (
    Gates,
    Norm,
    Pieces,
    Program,
    in_chunks,
    scale_of,
)

Convolved = list[list[Array]]  # of each convolution, of each token


class Held(NamedTuple):
    program: Program
    tiles: list[Tile]
    pieces: Pieces
    convolutions: list[Convolution]
    norms: list[Norm]

    @classmethod
    def load(cls, program: Program, ring: Ring) -> "Held":
        heads, config = program.options.heads, program.config
        tiles = [program.tile(i) for i in range(program.tiles)]
        pieces = Pieces.of(heads.K, program.tiles * config.block_v)
        channels = pieces.channels(heads, program.head, program.part)
        convolution = Convolution.load(program.x, ring, channels, program.steps)
        norms = []
        if config.programs == 1:
            norms = [Norm.load(program, tile.v, tile.in_v) for tile in tiles]
        return cls(program, tiles, pieces, [convolution], norms)

    def run(self, first: rule.Chunks, convolved: Convolved, gates: Gates) -> None:
        program, [values] = self.program, convolved
        outs: list[list[Array]] = [[] for _ in program.steps]
        following = first
        for i, tile in enumerate(self.tiles):
            state = unpack(following)
            if i + 1 < len(self.tiles):
                following = program.load_state(self.tiles[i + 1])
            for step, value in enumerate(values):
                q, k, v = self.pieces.take(value)
                token = program.prepare(step, in_chunks(q, tile), in_chunks(k, tile))
                v = self._in_tiles(v)[i]
                v = jnp.broadcast_to(v, tile.v.shape).astype(jnp.float32)
                now = gates.of_step(step)
                state, out = program.update(tile, step, state, token, now, v)
                outs[step].append(out)
            program.store.end(tile, state)
        for step, parts in enumerate(outs):
            self._finish(step, parts)

    def _in_tiles(self, v: Array) -> list[Array]:
        """v as `Pieces.take` has it -> of each tile [R W LV 1 1]"""
        rows, warps, lanes = self.tiles[0].row.shape[:3]
        v = v.reshape(-1, warps, lanes, rows).transpose(3, 1, 2, 0)
        parts = lax.split(v, (1,) * v.shape[3], axis=3)[: len(self.tiles)]
        return [part[..., None] for part in parts]

    def _finish(self, step: int, parts: list[Array]) -> None:
        if not self.norms:  # other programs have parts of the head
            for tile, out in zip(self.tiles, parts, strict=True):
                out = jnp.where(self.program.row.live, out, 0.0)
                self.program.store_out(step, tile.v, tile.in_v, out)
            return
        squares = jnp.zeros(parts[0].shape[1:])
        for part in parts:
            squares += jnp.sum(part * part, axis=0)
        scale = scale_of(squares, parts[0].shape[3], self.program.options)
        for norm, out in zip(self.norms, parts, strict=True):
            norm.store(self.program, step, out, scale)


class Streamed(NamedTuple):
    program: Program
    pieces: Pieces
    convolutions: list[Convolution]  # of q and k, and of v
    norm: Norm

    @classmethod
    def load(cls, program: Program, ring: Ring) -> "Streamed":
        heads = program.options.heads
        pieces = Pieces.of(heads.K, 0)
        keys = pieces.channels(heads, program.head, program.part)
        v = indices(pl.next_power_of_2(heads.V))
        in_v = v < heads.V
        first = heads.channels(program.head)[2], heads.columns(program.head)[0][2]
        values = Channels(first[0] + v, first[1] + v, in_v, in_v)
        convolutions = [
            Convolution.load(program.x, ring, channels, program.steps)
            for channels in (keys, values)
        ]
        return cls(program, pieces, convolutions, Norm.load(program, v, in_v))

    def run(self, first: rule.Chunks, convolved: Convolved, gates: Gates) -> None:
        program, (keys, values) = self.program, convolved
        for step, value in enumerate(values):
            program.store_out(step, self.norm.v, self.norm.mask, value)
        tokens, now = [], [gates.of_step(step) for step in range(len(keys))]
        for step, value in enumerate(keys):
            q, k = (in_chunks(y, program.tile(0)) for y in self.pieces.take(value))
            tokens.append(program.prepare(step, q, k))
        program.barrier()  # v is where it is read

        def load_v(tile: Tile) -> tuple[Array, ...]:
            ref, head = program.store.out_ref, program.head
            return tuple(tile.load_v(ref, at, head) for at in program.steps)

        def take(i, carry):
            (loaded, vs), squares = carry
            tile, state = program.tile(i), unpack(loaded)
            after = program.tile(jnp.minimum(i + 1, np.int32(program.tiles - 1)))
            following = program.load_state(after, i + 1 < program.tiles), load_v(after)
            sums = []
            for step, v in enumerate(vs):
                state, out = program.update(
                    tile, step, state, tokens[step], now[step], v.astype(jnp.float32)
                )
                sums.append(squares[step] + jnp.sum(out * out, axis=0))
                program.store_out(step, tile.v, tile.in_v, out)
            program.store.end(tile, state)
            return following, tuple(sums)

        tile = program.tile(0)
        none = (jnp.zeros(tile.v.shape[1:]),) * len(keys)
        carry = (first, load_v(tile)), none
        _, squares = lax.fori_loop(0, program.tiles, take, carry)
        program.barrier()  # out is where it is read
        for step, at in enumerate(program.steps):
            ref = program.store.out_ref.at[at, program.head, self.norm.v]
            out = _triton.load_where(ref, self.norm.mask).astype(jnp.float32)
            scale = scale_of(squares[step], tile.v.shape[3], program.options)
            self.norm.store(program, step, out, scale)
