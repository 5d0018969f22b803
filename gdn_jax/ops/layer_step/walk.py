"""How a program walks over its tiles of a head's state, v and out in registers: a loop
over tiles would have fewer loads in flight."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.layer_step.conv import Convolution, Ring
from gdn_jax.ops.layer_step.program import (
    Gates,
    Norm,
    Pieces,
    Program,
    in_chunks,
    scale_of,
    sum_of_squares,
)


class Walk(NamedTuple):
    program: Program
    tiles: list[Tile]
    pieces: Pieces
    convolution: Convolution
    norms: list[Norm]

    @classmethod
    def load(cls, program: Program, ring: Ring) -> "Walk":
        heads, config = program.options.heads, program.config
        tiles = [program.tile(i) for i in range(program.num_tiles)]
        pieces = Pieces.of(heads.K, program.num_tiles * config.block_v)
        channels = pieces.channels(heads, program.head, program.part)
        convolution = Convolution.load(program.x, ring, channels, program.steps)
        norms = [Norm.load(program, tile.v, tile.in_v) for tile in tiles]
        return cls(program, tiles, pieces, convolution, norms)

    def run(
        self, first: rule.Chunks, values: list[Array], gates: Gates, squares_ref: Any
    ) -> None:
        """`values`: of each token, its channels convolved. `squares_ref` is None where
        this program has the whole head."""
        program = self.program
        outs: list[list[Array]] = [[] for _ in program.steps]
        following = first
        for i, tile in enumerate(self.tiles):
            state = unpack(following)
            if i + 1 < len(self.tiles):
                following = program.load_state(self.tiles[i + 1])
            for step, value in enumerate(values):
                q, k, v = self.pieces.take(value)
                token = program.prepare(in_chunks(q, tile), in_chunks(k, tile))
                v = self._in_tiles(v)[i]
                v = jnp.broadcast_to(v, tile.v.shape).astype(jnp.float32)
                now = gates.of_step(step)
                state, out = program.update(tile, step, state, token, now, v)
                outs[step].append(out)
            program.store.end(tile, state)
        for step, parts in enumerate(outs):
            squares, scale = sum_of_squares(parts), None
            if squares_ref is None:
                scale = scale_of(squares, program.options)
            else:
                program.store_squares(squares_ref, step, squares)
            for norm, out in zip(self.norms, parts, strict=True):
                norm.store(program, step, out, scale)

    def _in_tiles(self, v: Array) -> list[Array]:
        """v as `Pieces.take` has it -> of each tile [R W LV 1 1]"""
        rows, warps, lanes = self.tiles[0].row.shape[:3]
        v = v.reshape(-1, warps, lanes, rows).transpose(3, 1, 2, 0)
        parts = lax.split(v, (1,) * v.shape[3], axis=3)[: len(self.tiles)]
        return [part[..., None] for part in parts]
