"""Which of a folder's tensors make which parameter: each once, or one error."""

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from gdn_jax.models import rules
from gdn_jax.models.files import DTYPES, Folder, Tensor
from gdn_jax.models.rules import Region, Source
from gdn_jax.ops import checks


class Target(NamedTuple):
    """A parameter of the model.

    Attributes:
      shape, dtype: its own.
      names: of its logical axes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor in its place."""

    source: Source
    tensor: Tensor


def cover(
    folder: Folder, targets: Mapping[str, Target], *, fused: bool, tied: bool
) -> dict[str, list[Piece]]:
    """The pieces of each parameter.

    Args:
      folder: what there is.
      targets: what is wanted, by path.
      fused: how the experts are named where the folder has none of them.
      tied: whether the model has no head of its own.

    Raises:
      ValueError: it is not all there, or there is more, or not in these shapes; every
        fault is listed.
    """
    found: dict[str, list[Tensor]] = collections.defaultdict(list)
    for tensor in folder.tensors:
        name = rules.canonical(tensor.name)
        if not rules.is_ignored(name, tied):
            found[name].append(tensor)
    pieces, missing, known, twice = {}, [], set(), []
    # One tensor each is not looked for where experts are more than there are tensors: a
    # config may claim any number of them.
    kinds = fused, not fused
    if _count_experts(targets) > len(found) + len(folder.lost or ()):
        kinds = True, True
    for path, target in targets.items():
        chosen, other = (
            {
                source.name: source
                for source in rules.sources_of(path, target.shape, kind)
            }
            for kind in kinds
        )
        if len(other.keys() & found.keys()) > len(chosen.keys() & found.keys()):
            chosen, other = other, chosen
        pieces[path] = [
            Piece(source, found[name][0])
            for name, source in chosen.items()
            if name in found
        ]
        missing += chosen.keys() - found.keys()
        known |= chosen.keys() | other.keys()
        both = (other.keys() - chosen.keys()) & found.keys()
        twice += [
            f"{name} (the experts in one tensor and in one each)" for name in both
        ]
    for name, tensors in found.items():
        if len(tensors) > 1:
            places = " and ".join(f"{x.name} in {x.file.name}" for x in tensors)
            twice.append(f"{name} ({places})")
    every = [piece for parts in pieces.values() for piece in parts]
    faults = {
        "broken or absent files": folder.faults,
        "missing tensors": _missing(missing, folder),
        "tensors that are not of this model": found.keys() - known,
        "tensors that are there twice": twice,
        "tensors of another shape": [
            f"{piece.tensor.name} {list(piece.tensor.shape)}, wanted "
            f"{list(piece.source.shape)}"
            for piece in every
            if piece.tensor.shape != piece.source.shape
        ],
        f"tensors of a dtype other than {', '.join(DTYPES)} (quantised?)": [
            f"{piece.tensor.name} {piece.tensor.dtype}"
            for piece in every
            if piece.tensor.dtype not in DTYPES
        ],
    }
    if lines := [_line(*fault) for fault in faults.items() if fault[1]]:
        raise ValueError(
            "the weights are not those of config.json's model:\n" + "\n".join(lines)
        )
    return pieces


def read(
    pieces: list[Piece], target: Target, index: Region | None = None
) -> np.ndarray:
    """A parameter, or a part of it, from the parts of files that hold it."""
    index = tuple(
        slice(*part.indices(size)[:2])
        for part, size in zip(
            index or [slice(None)] * len(target.shape), target.shape, strict=True
        )
    )
    out = np.empty([part.stop - part.start for part in index], target.dtype)
    for piece in pieces:
        region = piece.source.region
        part = tuple(
            slice(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(index, region, strict=True)
        )
        if all(side.start < side.stop for side in part):
            x = piece.tensor.read(piece.source.index(_within(part, region)))
            out[_within(part, index)] = piece.source.to_target(x)
    return out


def _within(part: Region, whole: Region) -> Region:
    """A part of `whole`, counted from its start."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start)
        for a, b in zip(part, whole, strict=True)
    )


def _count_experts(targets: Mapping[str, Target]) -> int:
    return sum(
        target.shape[0]
        for path, target in targets.items()
        if path.endswith("/experts_down")
    )


def _missing(names: list[str], folder: Folder) -> list[str]:
    """Without those of files that cannot be read, which have a line of their own."""
    if folder.faults and folder.lost is None:
        return []
    lost = {rules.canonical(name) for name in folder.lost or ()}
    return [name for name in names if name not in lost]


def _line(kind: str, names: Collection[str]) -> str:
    return f"  {len(names)} {kind}: {listed(names)}"


def listed(names: Collection[str]) -> str:
    return checks.listed(sorted(names))
