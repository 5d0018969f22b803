"""A call's tables as the two states of a layer take them: one null rule for both."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax.ops import batch, checks
from gdn_jax.ops.batch import Batch, Rows, can_stand


class Pools(NamedTuple):
    """How many slots the layer's two states have, and which one the caller reserves in
    `slots`; the tokens of the longest row that is not null, and S. Of replay also [P]
    how many tokens of each slot are pending."""

    conv: int
    recurrent: int
    null_slot: int | None
    columns: int = 1
    longest: int | None = None
    pending: Array | None = None


class Tables(NamedTuple):
    """One call's tables.

    Attributes:
      conv, recurrent: keyword arguments of the convolution and of the rule.
      rows: which rows are live, and where their states lie.
      live: for each token, whether it belongs to a live row; None if all do.
    """

    conv: dict[str, Any]
    recurrent: dict[str, Any]
    rows: Rows
    live: Array | None


def find_tables(
    given: Batch, conv_slots: ArrayLike | None, lead: tuple[int, ...], pools: Pools
) -> Tables:
    """`lead` are the tokens' axes, [N T] dense or [L] packed. A row whose slot is null
    in one of the two pools is made null in both."""
    num_rows, tokens, source = checks.rows_of(lead, given.cu_seqlens)
    if conv_slots is not None:
        conv_slots = checks.integers("conv_slots", conv_slots)
    check_tables(given, conv_slots, lead, pools)
    is_replay = pools.pending is not None
    nulls = is_replay or (pools.longest is not None and given.cu_seqlens is not None)
    if nulls and given.slots is None:
        given = given._replace(slots=_every_slot(num_rows, pools, source))
    rows = _find_rows(given, num_rows, tokens, lead, pools)
    keywords = given._asdict() | dict(null_slot=pools.null_slot)
    conv = recurrent = keywords
    slots = given.slots
    if nulls:
        rows = rows._replace(live=rows.live & _can_stand(given, rows, pools))
    if slots is not None and (nulls or not _is_one_table(slots, conv_slots, pools)):
        in_conv, conv_slots = _find_conv_slots(slots, conv_slots, pools)
        rows = rows._replace(live=rows.live & in_conv)
        live = rows.live if slots.ndim == 1 else rows.live[:, None]
        conv_slots = jnp.where(rows.live, conv_slots, -1)
        conv = keywords | dict(slots=conv_slots, null_slot=None)
        recurrent = keywords | dict(slots=jnp.where(live, slots, -1))
        if is_replay and given.num_accepted is None:
            # as the convolution takes one token of the last step to stand
            recurrent["num_accepted"] = jnp.ones(num_rows, jnp.int32)
    return Tables(conv, recurrent, rows, _live_tokens(given, rows, tokens, lead))


def check_tables(
    given: Batch, conv_slots: Array | None, lead: tuple[int, ...], pools: Pools
) -> None:
    num_rows, _, source = checks.rows_of(lead, given.cu_seqlens)
    checks.check_per_row(given, num_rows, source)
    _check_slots(given.slots, conv_slots, num_rows, source)
    if conv_slots is None and given.slots is not None and pools.conv < pools.recurrent:
        checks.fail(
            "conv_slots",
            f"None for the {pools.conv} slots of the convolution's state",
            f"given where those are not the {pools.recurrent} of the rule's",
            "Pass each row's slot of it, or make both states with as many.",
        )


def _every_slot(num_rows: int, pools: Pools, source: str) -> Array:
    """In place of slots that are not given: row i's is i."""
    checks.null_slot_of(pools.null_slot, pools.recurrent, None)
    if pools.recurrent != num_rows:
        checks.fail(
            "state",
            f"{pools.recurrent} states for {num_rows} rows",
            "one state per row where slots is None",
            f"Pass slots to use a pool ({source}).",
        )
    return jnp.arange(num_rows, dtype=jnp.int32)


def _can_stand(given: Batch, rows: Rows, pools: Pools) -> Array:
    """No more tokens than a step has room for, and of those that are pending no more
    stand than there are."""
    short = rows.live if pools.longest is None else rows.length <= pools.longest
    if pools.pending is None or given.num_accepted is None:
        return short
    pending = jnp.where(rows.keeps_state, pools.pending[rows.read], 0)
    return short & can_stand(given.num_accepted, pending, rows.keeps_state)


def _is_one_table(slots: Array, conv_slots: Array | None, pools: Pools) -> bool:
    """Whether both ops take the caller's slots as they are and find the same nulls."""
    return conv_slots is None and slots.ndim == 1 and pools.conv == pools.recurrent


def _find_conv_slots(
    slots: Array, conv_slots: Array | None, pools: Pools
) -> tuple[Array, Array]:
    """Whether each row has a slot for its convolution, and which."""
    if conv_slots is not None:
        return batch.is_live_slot(conv_slots, pools.conv, None), conv_slots
    first = slots if slots.ndim == 1 else slots[:, 0]
    return batch.is_live_slot(first, pools.conv, pools.null_slot), first


def _find_rows(
    given: Batch,
    num_rows: int,
    tokens: int | None,
    lead: tuple[int, ...],
    pools: Pools,
) -> Rows:
    is_table = given.slots is not None and given.slots.ndim == 2
    return batch.find_rows(
        given,
        jnp.arange(num_rows, dtype=jnp.int32),
        num_tokens=math.prod(lead),
        num_slots=pools.recurrent,
        tokens_per_row=tokens,
        columns=given.slots.shape[1] if is_table else pools.columns,
        null_slot=checks.null_slot_of(pools.null_slot, pools.recurrent, given.slots),
    )


def _live_tokens(
    given: Batch, rows: Rows, tokens: int | None, lead: tuple[int, ...]
) -> Array | None:
    if given.slots is None and given.cu_seqlens is None:
        return None
    if given.cu_seqlens is None:
        return rows.live if len(lead) == 1 else rows.live[:, None]
    if rows.live.size == 0:
        return jnp.zeros(lead, bool)
    return batch.find_owners(rows, lead[0], tokens)[2]


def _check_slots(
    slots: Array | None, conv_slots: Array | None, num_rows: int, source: str
) -> None:
    each = f"One entry a row: {source}."
    if slots is None:
        if conv_slots is not None:
            remedy = "The rule's states need slots too."
            checks.fail("conv_slots", "no slots", "given with slots", remedy)
        return
    if slots.ndim not in (1, 2) or slots.shape[0] != num_rows or 0 in slots.shape[1:]:
        checks.fail("slots", slots.shape, f"[N] or [N, S] with N = {num_rows}", each)
    if conv_slots is not None and conv_slots.shape != (num_rows,):
        checks.fail("conv_slots", conv_slots.shape, f"[N] = ({num_rows},)", each)
