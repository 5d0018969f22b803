"""One step of a layer in the form its kernel takes, and where its projections lie.

Tokens are packed, as in gated_delta's call.py.
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array

from gdn_jax import _types as t
from gdn_jax.ops import batch
from gdn_jax.ops.batch import Batch, Rows
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta.call import Options as RuleOptions
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.tables import Pools

LAYOUTS = "interleaved", "flat"
Stepped: TypeAlias = tuple[ConvState, Any, Array]  # conv, recurrent, out [L HV V]


class Projected(NamedTuple):
    """What tokens are projected to [L ..]; an array may be given under two names."""

    qkv: Array
    z: Array
    b: Array
    a: Array


class Weights(NamedTuple):
    conv: t.Filter
    A_log: t.PerHead
    dt_bias: t.PerHead
    norm: Array  # [V]


class Inputs(NamedTuple):
    conv: ConvState
    recurrent: Any  # [P HV V K], or a ReplayState
    projected: Projected
    weights: Weights
    tables: Batch
    conv_slots: Array | None

    @property
    def num_tokens(self) -> int:
        return self.projected.z.shape[0]

    @property
    def pool(self) -> Any:
        """[P HV V K], the rule's states in memory: of replay its checkpoints."""
        return pool_of(self.recurrent)

    @property
    def num_rows(self) -> int:
        return self.tables.num_rows(self.pool.shape[0])

    @property
    def columns(self) -> int:
        """S, the tokens of a step that the ring has room for."""
        return self.conv.buffer.shape[2] - self.weights.conv.shape[1] + 1

    def pools(self, null_slot: int | None) -> Pools:
        slots, columns = (self.conv.buffer.shape[0], self.pool.shape[0]), self.columns
        if isinstance(self.recurrent, ReplayState):
            longest = min(columns, self.recurrent.window)
            pending = self.recurrent.pending
            return Pools(*slots, null_slot, columns, longest, pending)
        return Pools(*slots, null_slot, longest=columns)


def pool_of(recurrent: Any) -> Any:
    is_replay = isinstance(recurrent, ReplayState)
    return recurrent.checkpoint if is_replay else recurrent


@dataclasses.dataclass(frozen=True)
class Heads:
    """Which columns of the projections and which channels are a head's.

    Interleaved, a key head has [q | k | v.. | z..] and [b.. | a..], its value heads one
    after another; flat, all heads' q come first, then k, v and z, and b before a.
    `apart`: z, b and a are arrays of their own.
    """

    H: int
    HV: int
    K: int
    V: int
    interleaved: bool
    apart: bool

    @property
    def group(self) -> int:
        return self.HV // self.H

    @property
    def split(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        return self.H * self.K, self.H * self.K, self.HV * self.V

    def is_first(self, head: Any) -> Any:
        """Of the value heads that read its key head."""
        return head % self.group == 0

    def channels(self, head: Any) -> tuple[Any, Any, Any]:
        """The first of a value head's q, k and v in the convolution's state."""
        q = head // self.group * self.K
        return q, self.H * self.K + q, 2 * self.H * self.K + head * self.V

    def columns(self, head: Any) -> tuple[tuple[Any, Any, Any], Any]:
        """The first of its q, k and v in `qkv`, and of z in `z`."""
        if not self.interleaved:
            z = head * self.V
            return self.channels(head), z if self.apart else sum(self.split) + z
        key, each = head // self.group, self.group * self.V
        q = key * (2 * self.K + 2 * each)
        v = q + 2 * self.K + (head - key * self.group) * self.V
        return (q, q + self.K, v), v + each

    def gates(self, head: Any) -> tuple[Any, Any]:
        """Of b and of a."""
        if self.interleaved:
            b = head // self.group * self.group + head
            return b, b + self.group
        return head, head if self.apart else self.HV + head


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static of a call."""

    rule: RuleOptions
    heads: Heads
    eps: float
    activation: str

    def steps(self, x: Inputs) -> int:
        """Tokens of a row, at the most."""
        return self.rule.tokens_per_row or x.columns


def find_rows(
    x: Inputs, options: Options, number: Array | None = None
) -> tuple[Rows, Rows]:
    """(rows of the rule, of the convolution), of all or of that number; a row that is
    null in one is null in both."""
    if number is None:
        number = jnp.arange(x.num_rows, dtype=jnp.int32)
    slots, rule = x.tables.slots, options.rule
    table = slots is not None and len(slots.shape) == 2
    rows = batch.find_rows(
        x.tables,
        number,
        num_tokens=x.num_tokens,
        num_slots=x.recurrent.shape[0],
        tokens_per_row=rule.tokens_per_row,
        columns=slots.shape[1] if table else 1,
        null_slot=rule.null_slot,
    )
    return null_in_both(x, options, rows)


def null_in_both(x: Inputs, options: Options, rows: Rows) -> tuple[Rows, Rows]:
    """`rows` of the rule, and those of the convolution."""
    own, num_slots = conv_slot(x, rows.number), x.conv.start.shape[0]
    null_slot = options.rule.null_slot if x.conv_slots is None else None
    live = rows.live & batch.is_live_slot(own, num_slots, null_slot)
    live &= rows.length <= x.columns
    if x.tables.num_accepted is not None:
        live &= x.tables.num_accepted[rows.number] <= x.columns
    rows = rows._replace(live=live, keeps_state=rows.keeps_state & live)
    return rows, rows._replace(read=jnp.where(live, own, 0))


def conv_slot(x: Inputs, number: Array) -> Array:
    """Of the row of that number, which may be null."""
    slots = x.tables.slots if x.conv_slots is None else x.conv_slots
    if slots is None:
        return number
    return slots[number] if len(slots.shape) == 1 else slots[number, 0]
