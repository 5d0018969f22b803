"""Slots of a state pool: who owns which, on the host; copies between them, on the
device."""

from __future__ import annotations  # so that help() names types and expands none

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax.ops import checks


class SlotPool:
    """Hands out the slots of a pool [P, ...] and knows who owns them.

    Host-side bookkeeping, for use outside jit. It holds no arrays: a freed slot keeps
    its old state on the device, so a new owner's first step passes `has_state` False.

        >>> from gdn_jax import SlotPool
        >>> pool = SlotPool(8)
        >>> pool.alloc("request 7", 4)                 # a token and three drafts
        [0, 1, 2, 3]
        >>> pool
        SlotPool(8 slots, 4 free, 1 owners)
        >>> pool.free("request 7")
        [0, 1, 2, 3]

    Args:
      num_slots: P, the slots of the state pool.
      null_slot: one that is never handed out, for callers that reserve one.
    """

    def __init__(self, num_slots: int, *, null_slot: int | None = None):
        remedy = "It is P, the first axis of the state pool."
        checks.count("num_slots", num_slots, remedy)
        if null_slot is not None and not 0 <= null_slot < num_slots:
            raise ValueError(
                f"null_slot must be one of the {num_slots} slots or None; got "
                f"{null_slot}. A slot outside the pool is null by itself."
            )
        self.num_slots = num_slots
        self.null_slot = null_slot
        # taken from the end, so the lowest slots go first
        self._free = [i for i in reversed(range(num_slots)) if i != null_slot]
        self._owned: dict[Hashable, list[int]] = {}

    def __repr__(self) -> str:
        owners = f"{len(self._owned)} owners"
        return f"SlotPool({self.num_slots} slots, {self.num_free} free, {owners})"

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def owners(self) -> tuple[Hashable, ...]:
        return tuple(self._owned)

    def alloc(self, owner: Hashable, count: int = 1) -> list[int]:
        """Gives `owner` `count` further slots, all or none.

        Raises:
          ValueError: count is < 1, or fewer slots than that are free.
        """
        checks.count("count", count, "An owner without slots needs none.")
        if count > len(self._free):
            raise ValueError(
                f"{owner!r} wants {count} slots and {len(self._free)} of "
                f"{self.num_slots} are free. Free an owner or make the pool larger."
            )
        owned = self._owned.setdefault(owner, [])  # first: it may not be hashable
        slots = [self._free.pop() for _ in range(count)]
        owned.extend(slots)
        return slots

    def slots(self, owner: Hashable) -> list[int]:
        """What `owner` has, in the order it was given.

        Raises:
          ValueError: the pool does not know the owner.
        """
        if owner not in self._owned:
            raise ValueError(f"{owner!r} owns no slots; owners are {self.owners[:8]}.")
        return list(self._owned[owner])

    def free(self, owner: Hashable, slots: Iterable[int] | None = None) -> list[int]:
        """Takes back all of an owner's slots, or some; returns them.

        Raises:
          ValueError: the owner is unknown, or a slot is not its own. Nothing is freed.
        """
        owned = self.slots(owner)
        freed = owned if slots is None else [operator.index(slot) for slot in slots]
        foreign = [slot for slot in freed if slot not in owned]
        if foreign or len(set(freed)) != len(freed):
            raise ValueError(
                f"{owner!r} can free each of its slots {owned} once; got {freed}."
            )
        kept = [slot for slot in owned if slot not in freed]
        if kept:
            self._owned[owner] = kept
        else:
            del self._owned[owner]
        self._free.extend(reversed(freed))
        return freed


def copy_slots(state: Any, src: ArrayLike, dst: ArrayLike) -> Any:
    """Copies slot src[i] to dst[i] of every pool in `state`: forks, prefix caching.

    Args:
      state: an array [P, ...] or a pytree of them, of one P. Donate it under jit: the
        copies then happen in place, and slots outside `dst` keep their bits.
      src, dst: [M] int32. A pair with either one outside [0, P) is skipped. All sources
        are read before any slot is written; a slot that stands twice in `dst` gets one
        of its sources.

    A fork of a row that decodes speculatively, slots [N, S], copies all of its S slots,
    and goes on with the same `num_accepted`: which of them counts is not known to the
    pool, and a layer's convolution keeps its inputs at the first.

    Returns:
      state, with the copies made.

    Raises:
      ValueError: src and dst are not int32 [M] of one length, or the pools are not of
        one P.
    """
    source, target = checks.integers("src", src), checks.integers("dst", dst)
    for name, slots in (("src", source), ("dst", target)):
        if slots.ndim != 1:
            raise ValueError(
                f"{name} must be [M]; got {slots.shape}. Pass one list of slots."
            )
    if source.shape != target.shape:
        raise ValueError(
            f"src and dst must be of one length; got {source.shape} and {target.shape}."
        )

    state = jax.tree.map(jnp.asarray, state)
    P = _slots_of(state)
    if P == 0:
        return state
    real = (source >= 0) & (source < P) & (target >= 0) & (target < P)
    source, target = jnp.where(real, source, 0), jnp.where(real, target, P)

    def copy(pool: Array) -> Array:
        return pool.at[target].set(pool[source], mode="drop")

    return jax.tree.map(copy, state)


def _slots_of(state: Any) -> int:
    shapes = [pool.shape for pool in jax.tree.leaves(state)]
    sizes = {shape[0] for shape in shapes if shape}
    if len(sizes) > 1 or () in shapes:
        raise ValueError(
            f"state must be pools [P, ...] of one P; got {shapes}. Copy those of "
            f"other sizes by slots of their own."
        )
    return max(sizes, default=0)
