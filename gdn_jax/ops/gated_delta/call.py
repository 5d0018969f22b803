"""One call of the recurrence in the form every implementation takes.

Tokens are packed: all rows one after another along L. `Options` holds what is static
(it is hashable), `Inputs` the arrays, or in a kernel the references to them. Optional
arrays that were not given are None.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from gdn_jax import _types as t
from gdn_jax.ops import batch
from gdn_jax.ops.batch import Batch, Rows


class GateLogits(NamedTuple):
    """Gates as a layer projects them; the fused update turns them into decay and beta.

    With per-K decay (KDA) `a` carries a K axis [L HV K] and `dt_bias` is [HV K].
    """

    A_log: t.PerHead
    a: Array
    b: t.PerToken
    dt_bias: Array

    PER_TOKEN = ("a", "b")

    @property
    def per_token(self) -> tuple[Any, Any]:
        return self.a, self.b


class Gates(NamedTuple):
    """Gates ready for the recurrence: log_decay [L HV] or [L HV K], beta [L HV]."""

    log_decay: Array
    beta: t.PerToken

    PER_TOKEN = ("log_decay", "beta")

    @property
    def per_token(self) -> tuple[Any, Any]:
        return self.log_decay, self.beta


class Inputs(NamedTuple):
    """`rounding` [W] uint32 are the words of a key by which stored states are rounded
    stochastically; None: to nearest."""

    state: t.State
    q: t.Query
    k: t.Key
    v: t.Value
    gates: GateLogits | Gates
    slots: t.Slots | None = None
    cu_seqlens: t.Boundaries | None = None
    num_accepted: t.Accepted | None = None
    has_state: t.HasState | None = None
    rounding: Array | None = None

    @property
    def num_rows(self) -> int:
        return self.tables.num_rows(self.state.shape[0])

    @property
    def tables(self) -> Batch:
        return Batch(self.slots, self.cu_seqlens, self.num_accepted, self.has_state)


@dataclasses.dataclass(frozen=True)
class GateOptions:
    softplus_beta: float = 1.0
    softplus_threshold: float = 20.0
    allow_neg_eigval: bool = False
    gate_lower_bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """`tokens_per_row` is None where `cu_seqlens` says which tokens are a row's, of
    which none that is not null has more than `longest`, if that is known."""

    tokens_per_row: int | None
    scale: float
    qk_l2norm: bool
    null_slot: int | None
    per_token_states: bool
    out_dtype: Any
    gating: GateOptions
    longest: int | None = None

    def is_live_slot(self, slot: Array, num_slots: int) -> Array:
        return batch.is_live_slot(slot, num_slots, self.null_slot)


def dtype_before_norm(dtype: Any) -> Any:
    """Of the rule's out where a norm follows, by the activations' dtype. A state that
    has grown is read past 65504, where float16 ends: of infinity the norm makes NaN,
    of the number itself something near 1."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def find_rows(x: Inputs, options: Options, number: Array | None = None) -> Rows:
    """The null rule for all rows, or for one of that number."""
    table = x.slots is not None and len(x.slots.shape) == 2
    return batch.find_rows(
        x.tables,
        jnp.arange(x.num_rows, dtype=jnp.int32) if number is None else number,
        num_tokens=x.q.shape[0],
        num_slots=x.state.shape[0],
        tokens_per_row=options.tokens_per_row,
        columns=x.slots.shape[1] if table else 1,
        null_slot=options.null_slot,
    )


def write_slots(x: Inputs, options: Options, rows: Rows, row: Array, step: Array):
    """The pool slot that takes the state after token `step` of `row`; P for none."""
    num_slots = x.state.shape[0]
    if x.slots is None or x.slots.ndim == 1:
        wanted = step == rows.length[row] - 1
        slot = rows.read[row]
    else:
        columns = x.slots.shape[1]
        wanted = (step >= 0) & (step < jnp.minimum(rows.length[row], columns))
        slot = x.slots[row, jnp.clip(step, 0, columns - 1)]
    wanted &= rows.live[row] & options.is_live_slot(slot, num_slots)
    return jnp.where(wanted, slot, num_slots)
