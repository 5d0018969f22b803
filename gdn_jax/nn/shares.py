"""Which part of each parameter a device has, where devices share a module out.

A part is a module of its own with fewer heads, columns and experts. Where there are
fewer key heads than devices, each is several devices', as if there were as many.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdn_jax.nn.projections import Heads
from gdn_jax.nn.split import Split
from gdn_jax.sharding.grid import AXES

Run = tuple[int, int]  # where it begins along an axis, and ends
Region = tuple[slice, ...]
Read = Callable[[Region], np.ndarray]  # of a whole parameter
Names = tuple[str | None, ...]  # of its logical axes

# Of two in a parameter the first here is split.
SPLIT = tuple(name for name in AXES if name not in ("rows", "embed"))


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


def _run(begin: int, size: int, heads: int, part: int, parts: int) -> Run:
    """A part's of so many heads; of fewer than parts, the one that it reads."""
    each = size // heads
    first, count = part * heads // parts, max(heads // parts, 1)
    return begin + first * each, begin + (first + count) * each
