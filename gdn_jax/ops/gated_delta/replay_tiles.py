"""What replay's two kernels share: how a row's tokens lie in their products, and what
the first leaves to the second."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops import batch
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import both, indices, inside
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut
from gdn_jax.ops.gated_delta.replay_call import Inputs, Turn

EXACT = 3  # parts that leave float32's own error
NARROWEST = 8  # columns of a product; it is rows that Triton pads to 16


def width(x: Any, options: Options) -> int:
    """W, of a row's tokens twice."""
    return max(NARROWEST, 2 * pl.next_power_of_2(x.longest(options)))


class Columns(NamedTuple):
    """A row's tokens twice, [W]: the key of each, which writes, and behind them the
    query of each, which reads: what all of them do to a state is one product."""

    step: Array
    writes: Array
    token: Array  # where in L; those that are not valid lie anywhere
    valid: Array

    @classmethod
    def of(cls, x: Any, number: Array, options: Options) -> "Columns":
        tokens = x.q.shape[0], options.tokens_per_row
        begin, length = batch.find_tokens(x.tables, number, *tokens)
        W = width(x, options)
        place = indices(W)
        step = place & np.int32(W // 2 - 1)
        valid = step < length
        return cls(step, place < W // 2, begin + step, valid)

    @property
    def keys(self) -> Array:
        return self.valid & self.writes

    @property
    def queries(self) -> Array:
        return self.valid & ~self.writes

    def records(self, turn: Turn, window: int) -> Array:
        """Where those of the keys lie; out of the window for others, since Pallas'
        interpreter writes back what a mask spares."""
        place = turn.column(turn.history + self.step, window)
        return jnp.where(self.keys, place, window)

    def load_keys(self, x: Any, head: Array, k: Array, in_k: Array | None) -> Array:
        """[W BK], as they came; 0 in the other columns."""
        return self._load(x.k, self.keys, head, k, in_k)

    def load(self, x: Any, head: Array, k: Array, in_k: Array | None) -> Array:
        """Keys and queries [W BK]."""
        queries = self._load(x.q, self.queries, head, k, in_k)
        return self.load_keys(x, head, k, in_k) + queries

    def _load(
        self, ref: Any, wanted: Array, head: Array, k: Array, in_k: Array | None
    ) -> Array:
        place = ref.at[self.token[:, None], head, k[None, :]]
        mask = both(wanted, in_k, shape=(wanted.size, k.size))
        return _triton.load(place, mask=mask, other=0)


class Sink(NamedTuple):
    """Out of a program's columns, in memory as it is. Something may be carried along V:
    `begin`s as, goes through `store`, and comes to an `end`."""

    ref: Any
    columns: Columns
    head: Array
    live: Array
    span: Array

    def tokens(self) -> Array:
        """Pallas' interpreter writes back what a mask spares: not where others write"""
        columns = self.columns
        return jnp.where(columns.queries, columns.token, self.ref.shape[0])

    def begin(self, block_v: int) -> Any:
        return None

    def store(self, made: Array, v: Array, in_v: Array | None, carried: Any) -> Any:
        """`made` [BV W]"""
        mask = both(in_v, self.columns.queries, shape=made.shape)
        place = self.ref.at[self.tokens()[None, :], self.head, v[:, None]]
        _triton.store(place, made.astype(self.ref.dtype), mask=mask)
        return carried

    def end(self, carried: Any) -> None:
        pass


def blocks_of(K: int, size: int) -> list[tuple[Array, Array | None]]:
    """(k, in_k) of each block along K."""
    blocks = [begin + indices(size) for begin in range(0, K, size)]
    return [(k, inside(k, K)) for k in blocks]


class Prepared(NamedTuple):
    """What the first kernel leaves to the second. Of a row: its turn. Of a key head:
    the records' keys, if the row folds, and the products of records' keys with the
    columns. Of a value head: what is left of each record, its key's norm in it, and of
    the checkpoint; and the columns' system, whose right side takes v and what was found
    in the state by these factors."""

    turns: Array  # [N 6]
    keys: Array  # [N H R K]
    met: Array  # [N H R W]
    weight: Array  # [N HV R]
    left: Array  # [N HV]
    v_factor: Array  # [N HV W]
    found_factor: Array  # [N HV W]
    inverse: Array  # [N HV W W]

    def store_turn(self, turn: Turn) -> None:
        rows = turn.rows
        of_row = rows.read, rows.live, rows.keeps_state
        fields = *of_row, turn.start, turn.history, turn.folds
        for i, field in enumerate(fields):
            self.turns[rows.number, np.int32(i)] = field.astype(jnp.int32)

    def load_turn(self, x: Any, number: Array, options: Options) -> Turn:
        tokens = x.q.shape[0], options.tokens_per_row
        read, live, keeps_state, start, history, folds = (
            self.turns[number, np.int32(i)] for i in range(6)
        )
        own = batch.find_tokens(x.tables, number, *tokens)
        rows = Rows(number, *own, read, live != 0, keeps_state != 0)
        return Turn(rows, start, history, folds != 0)


def prepared_shapes(x: Inputs, options: Options) -> list[tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of each of `Prepared`."""
    N, W = x.num_rows, width(x, options)
    _, HV, R, _ = x.state.u.shape
    H, K = x.k.shape[1:]
    heads = [(HV, R), (HV,), (HV, W), (HV, W), (HV, W, W)]
    return [
        ((N, 6), jnp.int32),
        ((N, H, R, K), x.state.k.dtype),
        ((N, H, R, W), jnp.float32),
        *(((N, *shape), jnp.float32) for shape in heads),
    ]


def cut_keys(x: Array) -> Parts:
    """As many as hold every value: float16 has 11 bits, bfloat16 8."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    return cut(x.astype(jnp.float32), 2 if x.dtype == jnp.float16 else EXACT)
