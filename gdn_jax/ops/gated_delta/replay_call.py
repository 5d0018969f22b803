"""One call of replay in the form every implementation takes, and what it does to each
row's records.

Tokens are packed, as in call.py, whose `Options` hold what is static.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from gdn_jax import _types as t
from gdn_jax.ops import batch
from gdn_jax.ops.batch import Batch, Rows
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import GateLogits, Options
from gdn_jax.ops.gated_delta.replay_state import ReplayState


class Inputs(NamedTuple):
    state: ReplayState
    q: t.Query
    k: t.Key
    v: t.Value
    gates: GateLogits
    tables: Batch

    @property
    def num_rows(self) -> int:
        return self.tables.num_rows(self.state.start.shape[0])

    def longest(self, options: Options) -> int:
        """No row has more tokens."""
        if options.tokens_per_row is not None:
            return options.tokens_per_row
        window = self.state.window
        return min(window, self.q.shape[0], options.longest or window)


class Turn(NamedTuple):
    """What a call does to the records of rows: of one row, or [N] of all.

    `history` records, from column `start` on, are of tokens that stand; the call's own
    come behind them. A row that folds writes its state with the history in it.
    """

    rows: Rows
    start: Array
    history: Array
    folds: Array

    def column(self, place: Array, window: int) -> Array:
        """Where the record lies that is `place` behind the oldest."""
        return (self.start + place) & (window - 1)  # a power of two

    def place(self, column: Array, window: int) -> Array:
        """How far it lies behind the oldest."""
        return (column - self.start) & (window - 1)


def find_turn(
    x: Inputs,
    options: Options,
    number: Array | None = None,
    stands: int | None = None,
) -> Turn:
    """The null rule, and for live rows what stands: all rows, or one of that number.
    Without `num_accepted` so many pending tokens do; None: all."""
    state, window = x.state, x.state.window
    if number is None:
        number = jnp.arange(x.num_rows, dtype=jnp.int32)
    rows = batch.find_rows(
        x.tables._replace(num_accepted=None),
        number,
        num_tokens=x.q.shape[0],
        num_slots=state.start.shape[0],
        tokens_per_row=options.tokens_per_row,
        columns=1,
        null_slot=options.null_slot,
    )
    pending = jnp.where(rows.keeps_state, state.pending[rows.read], 0)
    kept = pending if stands is None else jnp.minimum(pending, np.int32(stands))
    live = rows.live & (rows.length <= window)
    if x.tables.num_accepted is not None:
        accepted = x.tables.num_accepted[number]
        kept = jnp.where(pending > 0, accepted, 0)
        live &= (pending == 0) | ((accepted >= 1) & (accepted <= pending))
    rows = rows._replace(live=live, keeps_state=rows.keeps_state & live)
    committed = jnp.where(rows.keeps_state, state.committed[rows.read], 0)
    history = jnp.where(rows.keeps_state, committed + kept, 0)
    full = history + rows.length > window
    return Turn(
        rows, state.start[rows.read], history, live & (full | ~rows.keeps_state)
    )


def count(x: Inputs, turn: Turn) -> ReplayState:
    """The state, with the counters behind the call."""
    rows, window = turn.rows, x.state.window
    slot = jnp.where(rows.live, rows.read, x.state.start.shape[0])
    found = dict(
        start=jnp.where(turn.folds, turn.column(turn.history, window), turn.start),
        committed=jnp.where(turn.folds, 0, turn.history),
        pending=rows.length,
    )
    return x.state._replace(
        **{
            name: getattr(x.state, name).at[slot].set(value, mode="drop")
            for name, value in found.items()
        }
    )


class Made(NamedTuple):
    """Of each row's tokens, zeros past its last: u [N HV T V], k [N H T K] as it came,
    k_scale [N H T], log_decay [N HV T], or with K behind."""

    u: Array
    k: Array
    k_scale: Array
    log_decay: Array


def record(x: Inputs, turn: Turn, made: Made, state: Array) -> ReplayState:
    """The state behind the call: records, counters, and the checkpoints of the rows
    that fold, `state` [N HV V K]."""
    rows, num_slots = turn.rows, x.state.start.shape[0]
    # -inf, of a token that forgets everything, would make NaN of a later sum with 0
    log_decay = jnp.maximum(made.log_decay, rule.NO_DECAY_LEFT)
    made = made._replace(log_decay=log_decay)
    step = jnp.arange(made.u.shape[2])
    column = turn.column(turn.history + step[:, None], x.state.window).T  # [N T]
    wanted = rows.live[:, None] & (step < rows.length[:, None])
    slot = jnp.where(wanted, rows.read[:, None], num_slots)
    new = count(x, turn)
    records = {
        name: getattr(new, name)
        .at[slot, :, column]
        .set(value.swapaxes(1, 2).astype(getattr(new, name).dtype), mode="drop")
        for name, value in made._asdict().items()
    }
    slot = jnp.where(turn.folds, rows.read, num_slots)
    stored = state.astype(new.checkpoint.dtype)
    checkpoint = new.checkpoint.at[slot].set(stored, mode="drop")
    return new._replace(checkpoint=checkpoint, **records)


def tokens_of(x: Inputs, options: Options, turn: Turn):
    """(index [N T] of each row's tokens in L, whether there is one)."""
    step = jnp.arange(x.longest(options), dtype=jnp.int32)[None, :]
    live = turn.rows.live[:, None] & (step < turn.rows.length[:, None])
    return jnp.where(live, turn.rows.begin[:, None] + step, 0), live


def spread(x: Inputs, token: Array, live: Array, out: Array) -> Array:
    """[N T ..] of rows' tokens back to [L ..], zeros elsewhere."""
    num_tokens = x.q.shape[0]
    index = jnp.where(live, token, num_tokens)
    empty = jnp.zeros((num_tokens, *out.shape[2:]), out.dtype)
    return empty.at[index].set(out, mode="drop")
