"""Replay as two Pallas kernels (Triton lowering), and their launches.

The first (replay_prepare.py) has all that a row's keys say; the second meets the
states. A program of it walks along the V of one value head of a row, and has the
products S k and S q of all tokens by tensor cores; what the records add is a product of
their own, or, in a row that folds, part of the state that is written. The tokens among
each other are a triangular system of T unknowns (replay_xla.py has the equations),
whose inverse the first kernel leaves.

Float32 operands are cut into bfloat16 parts (chunk_parts.py): the state into
`config.parts` where it is read, and into three what is folded into it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import both, indices, inside, load
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, cut_array, dot, long_dot
from gdn_jax.ops.gated_delta.replay_call import (
    Inputs,
    Turn,
    find_turn,
    spread,
    tokens_of,
)
from gdn_jax.ops.gated_delta.replay_prepare import prepare_kernel
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.gated_delta.replay_tiles import (
    EXACT,
    Columns,
    Prepared,
    Sink,
    blocks_of,
    cut_keys,
    prepared_shapes,
)
from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig

APPENDED = "k", "k_scale", "log_decay"  # by the first kernel
WRITTEN = "checkpoint", "u", "start", "committed", "pending"  # by the second


def replay_triton(
    x: Inputs, options: Options, config: ReplayConfig, interpret: bool
) -> tuple[ReplayState, Array]:
    V, K = x.state.checkpoint.shape[2:]
    config = config.fitted(V, K)
    of_call = dict(options=options, config=config, interpret=interpret)
    old, (H, HV) = x.state, (x.k.shape[1], x.v.shape[1])

    leaf = ReplayState._fields.index  # the state's are the first leaves of Inputs
    shapes = prepared_shapes(x, options)
    *prepared, k, k_scale, log_decay = _triton.launch(
        functools.partial(prepare_kernel, **of_call),
        x,
        (*shapes, *(_triton.shape_of(getattr(old, name)) for name in APPENDED)),
        grid=(H, x.num_rows),
        aliases={leaf(name): len(shapes) + i for i, name in enumerate(APPENDED)},
        num_warps=config.prepare_warps,
        interpret=interpret,
    )
    x = x._replace(state=old._replace(k=k, k_scale=k_scale, log_decay=log_decay))
    written = [getattr(old, name) for name in WRITTEN]
    checkpoint, u, start, committed, pending, out = _triton.launch(
        functools.partial(meet_kernel, **of_call),
        (x, Prepared(*prepared)),
        (*map(_triton.shape_of, written), (x.v.shape, options.out_dtype)),
        grid=(config.spans(V), HV, x.num_rows),
        aliases={leaf(name): i for i, name in enumerate(WRITTEN)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    new = ReplayState(checkpoint, u, k, k_scale, log_decay, start, committed, pending)
    if options.tokens_per_row is None:
        out = cleared(out, x, options, find_turn(x, options))
    return new, out


def cleared(out: Array, x: Inputs, options: Options, turn: Turn) -> Array:
    """Zeros for tokens of no live row: the kernel writes rows' own alone."""
    token, live = tokens_of(x, options, turn)
    owned = spread(x, token, live, live)
    return jnp.where(owned[:, None, None], out, jnp.zeros((), out.dtype))


def meet_kernel(
    inputs: tuple[Any, Any],
    checkpoint_ref,
    u_ref,
    start_ref,
    committed_ref,
    pending_ref,
    out_ref,
    *,
    options: Options,
    config: ReplayConfig,
    interpret: bool,
    make_sink: Callable[..., Any] | None = None,
) -> None:
    """`inputs` are `Inputs` and `Prepared` of references; behind them what of the state
    is written, and out. Grid: (spans of V, value heads, rows). `make_sink` is of what
    takes out, as `Sink` does."""
    x, prepared = inputs
    span, value, number = (pl.program_id(i) for i in range(3))
    turn = prepared.load_turn(x, number, options)
    # Of null rows too, and before anything else: so memory is waited for once.
    head = _Head.load(x, prepared, turn, value, options, config)
    V, R, columns = x.v.shape[2], x.state.window, head.columns
    slot, new = turn.rows.read, columns.records(turn, R)
    sink = (make_sink or Sink)(out_ref, columns, value, turn.rows.live, span)

    def along_v(visit: Callable[[Array, Array | None], Array]) -> None:
        """`visit` returns u and out [BV W] of the columns."""

        def step(i, carried):
            first = (span * np.int32(config.steps_v) + i) * np.int32(config.block_v)
            v = first + indices(config.block_v)
            in_v = inside(v, V, config.spans(V) * config.steps_v)
            made = visit(v, in_v)
            if not interpret:
                _triton.barrier()  # all of the program's warps have read the old u
            mask = both(in_v, columns.keys & turn.rows.live, shape=made.shape)
            place = u_ref.at[slot, value, new[None, :], v[:, None]]
            _triton.store(place, made, mask=mask)
            return sink.store(made, v, in_v, carried)

        first, last = np.int32(0), np.int32(config.steps_v)
        sink.end(lax.fori_loop(first, last, step, sink.begin(config.block_v)))

    def fold():
        keys = head.load_keys(x, prepared)
        along_v(lambda v, in_v: head.fold(x, keys, checkpoint_ref, v, in_v))

    @pl.when(turn.rows.live)
    def _():
        pl.when(turn.folds)(fold)
        pl.when(~turn.folds)(lambda: along_v(functools.partial(head.read, x)))

        @pl.when((value == 0) & (span == 0))
        def _():
            moved = turn.column(turn.history, R)
            start_ref[slot] = jnp.where(turn.folds, moved, turn.start)
            committed_ref[slot] = jnp.where(turn.folds, 0, turn.history)
            pending_ref[slot] = turn.rows.length

    if options.tokens_per_row is not None:
        nothing = jnp.zeros((config.block_v, columns.step.size), jnp.float32)
        pl.when(~turn.rows.live)(lambda: along_v(lambda v, in_v: nothing))


class _Head(NamedTuple):
    """A value head of a row, and what its program holds while it walks along V.

    `own` are the keys and queries of the columns [W BK], for each block of K. Their
    products with the records' keys are `met`, those with the state are `found`.
    """

    value: Array
    key: Array
    turn: Turn
    columns: Columns
    blocks: list[tuple[Array, Array | None]]
    own: list[Parts]
    met: Parts
    weight: Array
    left: Array
    v_factor: Array
    found_factor: Array
    inverse: Parts
    parts: int

    @classmethod
    def load(
        cls,
        x: Any,
        prepared: Any,
        turn: Turn,
        value: Array,
        options: Options,
        config: ReplayConfig,
    ) -> "_Head":
        number, group = turn.rows.number, x.v.shape[1] // x.k.shape[1]
        key = lax.div(value, np.int32(group))
        columns = Columns.of(x, number, options)
        record, column = indices(x.state.window), indices(columns.step.size)
        whole = None, None
        met = load(prepared.met, (record, column), whole, number, key)
        inverse = load(prepared.inverse, (column, column), whole, number, value)
        blocks = blocks_of(x.k.shape[2], config.block_k)
        return cls(
            value,
            key,
            turn,
            columns,
            blocks,
            own=[cut_keys(columns.load(x, key, *block)) for block in blocks],
            met=cut(met, EXACT),
            weight=_triton.load(prepared.weight.at[number, value, record]),
            left=_triton.load(prepared.left.at[number, value]),
            v_factor=_triton.load(prepared.v_factor.at[number, value, column]),
            found_factor=_triton.load(prepared.found_factor.at[number, value, column]),
            inverse=cut(inverse, EXACT),
            parts=config.parts_of(x.state.checkpoint.dtype),
        )

    def load_keys(self, x: Any, prepared: Any) -> list[Parts]:
        """Of the records, if the row folds: [R BK] for each block of K."""
        record, number = indices(x.state.window), self.turn.rows.number
        return [
            cut_keys(load(prepared.keys, (record, k), (None, in_k), number, self.key))
            for k, in_k in self.blocks
        ]

    def load_u(self, x: Any, v: Array, in_v: Array | None) -> Parts:
        """Of the records that stand [BV R], with what is left of each."""
        record, slot = indices(x.state.window), self.turn.rows.read
        mask = both(in_v, self.weight != 0, shape=(v.size, record.size))
        place = x.state.u.at[slot, self.value, record[None, :], v[:, None]]
        u = _triton.load(place, mask=mask, other=0)
        return cut(u * self.weight[None, :], EXACT)

    def load_state(self, x: Any, v: Array, in_v: Array | None, block: Any) -> Array:
        """Of the checkpoint [BV BK], in its dtype."""
        (k, in_k), slot = block, self.turn.rows.read
        return load(x.state.checkpoint, (v, k), (in_v, in_k), slot, self.value)

    def read(self, x: Any, v: Array, in_v: Array | None) -> Array:
        """What the records add is a product of their own."""
        found = dot(self.load_u(x, v, in_v), self.met)
        for block, own in zip(self.blocks, self.own, strict=True):
            # each part by itself, or Triton makes one chain of products, each of which
            # waits for the one before; here a row does little else
            for part in cut_array(self.load_state(x, v, in_v, block), self.parts):
                found += self.left * dot((part,), own, trans_y=True)
        return self.solve(x, v, in_v, found)

    def fold(
        self, x: Any, keys: list[Parts], checkpoint_ref, v: Array, in_v: Array | None
    ) -> Array:
        """The columns meet what is stored."""
        reads = jnp.broadcast_to(self.turn.rows.keeps_state, v.shape)
        reads = reads if in_v is None else reads & in_v
        u, slot = self.load_u(x, v, in_v), self.turn.rows.read
        found = jnp.zeros((v.size, self.columns.step.size), jnp.float32)
        for block, old, own in zip(self.blocks, keys, self.own, strict=True):
            state = self.load_state(x, v, reads, block).astype(jnp.float32)
            state = self.left * state + dot(u, old)
            state = state.astype(checkpoint_ref.dtype)
            k, in_k = block
            place = checkpoint_ref.at[slot, self.value, v[:, None], k[None, :]]
            _triton.store(place, state, mask=both(in_v, in_k, shape=state.shape))
            found += dot(cut_array(state, self.parts), own, trans_y=True)
        return self.solve(x, v, in_v, found)

    def solve(self, x: Any, v: Array, in_v: Array | None, found: Array) -> Array:
        """u of the columns that write, out of those that read [BV W]."""
        columns = self.columns
        mask = both(in_v, columns.keys, shape=found.shape)
        own = x.v.at[columns.token[None, :], self.value, v[:, None]]
        own = _triton.load(own, mask=mask, other=0).astype(jnp.float32)
        right = self.v_factor[None, :] * own + self.found_factor[None, :] * found
        return long_dot(cut(right, EXACT), self.inverse)
