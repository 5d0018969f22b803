"""What a slot table may hide under jit, found on the host."""

from typing import Any

import numpy as np


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
    counts outside 1..S, and slots that two rows, or two columns of a row, would write.
    Every column counts as used, or with `cu_seqlens` those that the rows' tokens write
    and the one that each row reads.
    """
    table = np.asarray(slots)
    table = table[:, None] if table.ndim == 1 else table
    null = (table == -1) | (table == null_slot if null_slot is not None else False)
    if cu_seqlens is not None:
        column = np.arange(table.shape[1])
        lengths = np.diff(np.asarray(cu_seqlens))[:, None]
        used = (column < lengths) if num_accepted is not None else lengths > 0
        if num_accepted is not None:
            used |= (column == np.asarray(num_accepted)[:, None] - 1) & (lengths > 0)
        null |= ~used
    faults = [
        f"row {n}, column {c}: slot {table[n, c]} is outside [0, {num_slots})"
        for n, c in np.argwhere(~null & ((table < 0) | (table >= num_slots)))
    ]
    if num_accepted is not None:
        accepted = np.asarray(num_accepted)
        faults += [
            f"row {n}: num_accepted {accepted[n]} is outside 1..{table.shape[1]}"
            for n in np.flatnonzero((accepted < 1) | (accepted > table.shape[1]))
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
