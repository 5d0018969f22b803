"""Which part of each parameter a device has, where devices share a module out.

A part is a module of its own with fewer heads, columns and experts. Where there are
fewer key heads than devices, each is several devices', as if there were as many.
"""

from __future__ import annotations  # so that help() names types and expands none

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdn_jax.nn.projections import Heads
from gdn_jax.nn.split import Split
from gdn_jax.sharding.grid import AXES

Run = tuple[int, int]  # where it begins along an axis, and ends
Region = tuple[slice, ...]
Read = Callable[[Region], np.ndarray]  # of a whole parameter
Names = tuple[str | None, ...]  # of its logical axes

# In the order of the table: of two in a parameter the first is split.
SPLIT = tuple(name for name in AXES if name not in ("rows", "embed"))


class Copies(NamedTuple):
    """What of a parameter several parts have, one beside another.

    Attributes:
      axis: that which is split.
      parts: how many share it.
      runs: where each of a part's runs begins and ends there, and how many have it.
      where: it lies on the mesh.
    """

    axis: int
    parts: int
    runs: tuple[tuple[int, int, int], ...]
    where: NamedSharding


@dataclasses.dataclass(frozen=True)
class Shares:
    """How parameters are shared out; each is named by its path and its axes' names.

    Attributes:
      mesh: the devices.
      split: None: each has all of everything.
      heads: of Gated DeltaNet layers, of the whole module.
      kv_heads: of attention.
    """

    mesh: Mesh
    split: Split | None
    heads: Heads
    kv_heads: int = 1

    def spec(self, path: str, names: Names) -> PartitionSpec:
        """How it lies on the mesh."""
        axis = self.axis(path, names)
        if axis is None or self.split is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, self.split.axes)

    def shape(self, path: str, names: Names, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What it has there: more than the whole module's where heads are several
        devices'."""
        axis = self.axis(path, names)
        if axis is None or self.split is None:
            return shape
        size = sum(end - begin for begin, end in self.runs(path, names, shape, 0))
        return (*shape[:axis], size * self.split.parts, *shape[axis + 1 :])

    def place(
        self, path: str, names: Names, shape: tuple[int, ...], read: Read
    ) -> Array:
        """The array on the mesh, of which each process reads its devices' parts."""
        axis = self.axis(path, names)
        there = self.shape(path, names, shape)
        whole = [slice(0, size) for size in shape]
        found: dict[int, np.ndarray] = {}

        def part_of(index: Any) -> np.ndarray:
            if axis is None or self.split is None:
                return found.setdefault(0, read(tuple(whole)))
            part = (index[axis].start or 0) * self.split.parts // there[axis]
            if part not in found:
                pieces = [
                    read((*whole[:axis], slice(*run), *whole[axis + 1 :]))
                    for run in self.runs(path, names, shape, part)
                ]
                found[part] = np.concatenate(pieces, axis) if pieces[1:] else pieces[0]
            return found[part]

        sharding = NamedSharding(self.mesh, self.spec(path, names))
        array = jax.make_array_from_callback(there, sharding, part_of)
        return array.block_until_ready()  # until then the host holds it as well

    def tied(
        self, arrays: Mapping[str, Array], boxes: Mapping[str, tuple[Names, Any]]
    ) -> dict[str, Array]:
        """The parameters as they are, but that where parts have copies the gradient of
        each is that of all.

        boxes: by path, the names of a parameter's axes and the whole module's shape.
        """
        copies = {path: self.copies(path, *boxes[path]) for path in arrays}
        return {
            path: x if (found := copies[path]) is None else tie(found, x)
            for path, x in arrays.items()
        }

    def copies(self, path: str, names: Names, shape: tuple[int, ...]) -> Copies | None:
        """None where no part has what another has."""
        axis = self.axis(path, names)
        if axis is None or self.split is None:
            return None
        parts = range(self.split.parts)
        runs = [self.runs(path, names, shape, part) for part in parts]
        found, end = [], 0
        for i, (first, last) in enumerate(runs[0]):
            begin, end = end, end + last - first
            found.append((begin, end, sum(own[i] == runs[0][i] for own in runs)))
        if all(count == 1 for _, _, count in found):
            return None
        where = NamedSharding(self.mesh, self.spec(path, names))
        return Copies(axis, self.split.parts, tuple(found), where)

    def check_places(
        self, arrays: Mapping[str, Any], names: Mapping[str, Names], remedy: str
    ) -> None:
        """The whole module's may be of the same shapes, with columns in another order.

        Raises:
          ValueError: one does not lie where `place` puts it.
        """
        for path, array in arrays.items():
            there = NamedSharding(self.mesh, self.spec(path, names[path]))
            got = getattr(array, "sharding", None)  # NumPy's has none
            if got is None or not got.is_equivalent_to(there, array.ndim):
                wanted = f"params/{path} must lie on the mesh as {there.spec}"
                raise ValueError(f"{wanted}; got {got or type(array)}. {remedy}")

    def axis(self, path: str, names: Names) -> int | None:
        """That which is split; None: every device has all of it."""
        if self.split is None or "router" in path.split("/"):
            return None  # every device chooses among all experts
        for name in SPLIT:
            if name in names:
                is_whole = name == "vocab" and not self.split.vocab
                return None if is_whole else names.index(name)
        return None

    def runs(
        self, path: str, names: Names, shape: tuple[int, ...], part: int
    ) -> list[Run]:
        """What a part has of the axis that is split, one behind another."""
        axis = self.axis(path, names)
        assert axis is not None and self.split is not None
        name, size, parts = names[axis], shape[axis], self.split.parts
        H, HV, K, V = dataclasses.astuple(self.heads)
        if name == "kv_heads":
            return [_run(0, size, self.kv_heads, part, parts)]
        if name == "gdn_channels":
            keys = [_run(begin, H * K, H, part, parts) for begin in (0, H * K)]
            return [*keys, _run(2 * H * K, HV * V, HV, part, parts)]
        if name != "gdn_key_heads" or H % parts == 0:
            return [_run(0, size, parts, part, parts)]
        first, last = _run(0, size, H, part, parts)
        group, last_names = HV // H, path.split("/")
        if "qkvz" in last_names:
            widths = [(K, 1), (K, 1), (group * V, parts // H), (group * V, parts // H)]
        elif "ba" in last_names:
            widths = [(group, parts // H)] * 2
        else:
            return [(first, last)]
        runs = []
        for width, shares in widths:  # of one key head, which so many parts have
            begin = first + width // shares * (part % shares)
            runs.append((begin, begin + width // shares))
            first += width
        return runs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tie(copies: Copies, x: Array) -> Array:
    del copies
    return x


def _tie_forwards(copies: Copies, x: Array) -> tuple[Array, None]:
    return tie(copies, x), None


def _tie_backwards(copies: Copies, saved: None, ct: Array) -> tuple[Array]:
    del saved
    axis, parts, runs, where = copies
    lead, rest = ct.shape[:axis], ct.shape[axis + 1 :]
    by_parts = ct.reshape(*lead, parts, -1, *rest)
    summed = []
    for begin, end, count in runs:
        own = lax.slice_in_dim(by_parts, begin, end, axis=axis + 1)
        alike = own.reshape(*lead, parts // count, count, end - begin, *rest)
        total = jnp.sum(alike, axis + 1, keepdims=True)
        summed.append(jnp.broadcast_to(total, alike.shape).reshape(own.shape))
    ct = jnp.concatenate(summed, axis + 1).reshape(ct.shape)
    return (lax.with_sharding_constraint(ct, where),)


tie.defvjp(_tie_forwards, _tie_backwards)


def is_traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def _run(begin: int, size: int, heads: int, part: int, parts: int) -> Run:
    """A part's of so many heads; of fewer than parts, the one that it reads."""
    each = size // heads
    first, count = part * heads // parts, max(heads // parts, 1)
    return begin + first * each, begin + (first + count) * each
