"""What a slot table may hide under jit, found on the host."""

from typing import Any

import numpy as np
from jax.core import Tracer

from gdn_jax.ops import checks


def check_slots(
    slots: Any,
    num_slots: int,
    *,
    num_accepted: Any = None,
    cu_seqlens: Any = None,
    null_slot: int | None = None,
) -> None:
    """Raises ValueError for a slot table that `fused_update` would take in silence.

    Eager, on the host: for a debug run, not for jit. Finds slots outside [0, num_slots)
    other than -1 and `null_slot` (they are null, which may not be meant), accepted
    counts outside 1..S (with one slot a row, as `replay_update` has, below 1),
    `cu_seqlens` that fall, and slots that two rows, or two columns of a row, would
    write. Every column counts as used, or with `cu_seqlens` those that the rows' tokens
    write and the one that each row reads. A row all of whose slots are null is one that
    pads the batch: nothing is asked of its counts.
    """
    remedy = "It is P, the first axis of the state pool."
    if num_slots != 0:
        checks.count("num_slots", num_slots, remedy)
    table = _integers("slots", slots)
    if table.ndim not in (1, 2):
        checks.fail("slots", table.shape, "[N] or [N, S]", "One entry a row.")
    if table.ndim == 2 and num_accepted is None:
        remedy = "Pass num_accepted [N] (ones at first), or one slot a row."
        checks.fail("slots", table.shape, "[N] where num_accepted is None", remedy)
    is_table = table.ndim == 2
    table = table if is_table else table[:, None]
    rows, columns = table.shape
    accepted = _integers("num_accepted", num_accepted, rows)
    boundaries = _integers("cu_seqlens", cu_seqlens, rows + 1)

    null = (table == -1) | (table == null_slot if null_slot is not None else False)
    padding = null.all(axis=1)
    faults = []
    if boundaries is not None:
        lengths = np.diff(boundaries)
        faults += [
            f"row {n}: cu_seqlens falls from {boundaries[n]} to {boundaries[n + 1]}"
            for n in np.flatnonzero(lengths < 0)
        ]
        null |= ~_used(columns, lengths[:, None], accepted)
    faults += [
        f"row {n}, column {c}: slot {table[n, c]} is outside [0, {num_slots})"
        for n, c in np.argwhere(~null & ((table < 0) | (table >= num_slots)))
    ]
    if accepted is not None:
        most = columns if is_table else ""
        outside = (accepted < 1) | (is_table & (accepted > columns))
        faults += [
            f"row {n}: num_accepted {accepted[n]} is outside 1..{most}"
            for n in np.flatnonzero(outside & ~padding)
        ]
    owners: dict[int, list[tuple[int, int]]] = {}
    for n, c in np.argwhere(~null):
        owners.setdefault(int(table[n, c]), []).append((int(n), int(c)))
    faults += [
        f"slot {slot} is given to (row, column) {', '.join(map(str, places))}"
        for slot, places in owners.items()
        if len(places) > 1
    ]
    if faults:
        shown = "\n  ".join(faults[:20])
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise ValueError(f"slots has {count}:\n  {shown}{more}")


def _integers(name: str, x: Any, length: int | None = None) -> Any:
    """On the host; [length] if that is given. None stays None."""
    if x is None:
        return None
    if isinstance(x, Tracer):
        remedy = "Call check_slots on the host, outside jit."
        checks.fail(name, "a tracer", "an array of values", remedy)
    x = np.asarray(x)
    if x.size and x.dtype.kind not in "iu":
        checks.fail(name, x.dtype, "of integers", "Slots and counts are int32.")
    if length is not None and x.shape != (length,):
        remedy = "One entry a row; cu_seqlens has one more."
        checks.fail(name, x.shape, f"[{length}], as slots has rows", remedy)
    return x


def _used(columns: int, lengths: np.ndarray, accepted: np.ndarray | None) -> np.ndarray:
    """Of the slots of each row, those that its tokens write and the one it reads."""
    column = np.arange(columns)
    if accepted is None:
        return np.broadcast_to(lengths > 0, (lengths.shape[0], columns))
    read = column == accepted[:, None] - 1
    return (column < lengths) | (read & (lengths > 0))
