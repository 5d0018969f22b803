"""The safetensors files of a folder: what they hold, and writing them."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gdn_jax import _trees
from gdn_jax.models import config_file
from gdn_jax.models.rules import Region
from gdn_jax.ops import checks

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Those of a model with 70 thousand tensors have 10 million; read, JSON takes many times
# its file's memory.
MOST_INDEX_BYTES = 2**24
# Folders of a save in the folder that it is of: while its files are written, and while
# they take the places of the old ones.
WRITING, REPLACING = ".saving", ".replacing"
# What a save writes, and no other file of weights, as an adapter's.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))
# By safetensors' names; weights in others are quantised or no weights.
DTYPES = dict(F32="float32", BF16="bfloat16", F16="float16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of a file's.

    Attributes:
      file, name: where it is.
      shape: its own.
      dtype: by safetensors' name.
      slices: `safe_open(..).get_slice(name)`, of which an index reads that part.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: Any

    def read(self, region: Region) -> np.ndarray:
        return self.slices[region]


@dataclasses.dataclass
class Folder:
    """What a folder's files hold.

    Attributes:
      tensors: all of them, of all files that can be read.
      faults: a line for each file that cannot.
      lost: names that the index puts into those; None if there is no index to tell.
    """

    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    lost: set[str] | None = None


def read_folder(path: pathlib.Path) -> Folder:
    """Opens every file of a model; what they hold is read later, piece by piece.

    As transformers: model.safetensors, or else the files that the index names, or else
    every file there is.

    Raises:
      FileNotFoundError: there is no safetensors file.
      ValueError: the index is broken, or names what is no file of this folder; or a
        save was stopped while its files took the old ones' places.
    """
    if (path / REPLACING).exists():
        raise ValueError(
            f"a save to {path} was stopped while its files took the old ones' places. "
            f"Move those that are left up from {path / REPLACING} and delete it, or "
            "save again."
        )
    folder, index, held = Folder(), path / INDEX, {}
    if (path / SINGLE).exists():
        files = [SINGLE]
    elif index.exists():
        held = _read_index(index)
        files, folder.lost = sorted(held), set()
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"no safetensors files in {path}. Download the model's; one in another "
                "format has to be converted first."
            )
    for file in files:
        try:
            folder.tensors += _tensors(path / file)
        except FileNotFoundError:
            reason = "absent: download it"
        except (OSError, SafetensorError) as error:
            reason = f"{error}: download it again"
        else:
            continue
        folder.faults.append(f"{file} ({reason})")
        if folder.lost is not None:
            folder.lost |= held[file]
    return folder


def _read_index(index: pathlib.Path) -> dict[str, set[str]]:
    """Names of the tensors in each file."""
    weight_map = config_file.read(index, MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map. Download it again.")
    held = collections.defaultdict(set)
    for name, file in weight_map.items():
        if not _is_file_name(file):
            raise ValueError(
                f"{index} names {checks.shown(file)}, wanted a safetensors file in its "
                "own folder. Download it again, from a source that you trust."
            )
        held[file].add(name)
    return held


def _is_file_name(file: Any) -> bool:
    """Without a folder, in any system's spelling. What a file of the folder links to is
    its owner's choice: Hugging Face's own cache is made of links."""
    return (
        isinstance(file, str)
        and file.isprintable()
        and file.endswith(".safetensors")
        and pathlib.PureWindowsPath(file).name == file
    )


def _tensors(file: pathlib.Path) -> list[Tensor]:
    if not file.exists():
        raise FileNotFoundError
    if not file.is_file():  # opening a FIFO would wait for its other end
        raise OSError("no file")
    opened, tensors = safe_open(file, "numpy"), []
    for name in opened.keys():  # noqa: SIM118, it is no mapping
        slices = opened.get_slice(name)
        shape = tuple(slices.get_shape())
        tensors.append(Tensor(file, name, shape, slices.get_dtype(), slices))
    return tensors


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder inside `path` for new files, which take the old ones' places at the end.
    Older files of weights that no new one replaces are deleted.

    Whatever stops the writing leaves `path` as it was. What stops the renames behind it
    leaves `REPLACING` with the files that are not yet in their places: such a folder is
    refused by `read_folder`, and the next save writes all of it."""
    path.mkdir(parents=True, exist_ok=True)
    new, complete = path / WRITING, path / REPLACING
    shutil.rmtree(new, ignore_errors=True)  # of one that was killed
    new.mkdir()
    try:
        yield new
        for file in new.iterdir():
            _trees.on_disk(file)
        names = {file.name for file in new.iterdir()}
        if complete.exists():  # and has to be there until this save's is
            for file in complete.iterdir():
                file.unlink()
        os.replace(new, complete)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    old = {file.name for file in path.iterdir() if WEIGHTS.fullmatch(file.name)}
    for name in sorted(old - names):
        (path / name).unlink()
    for name in sorted(names):
        os.replace(complete / name, path / name)
    complete.rmdir()
    _trees.on_disk(path)


def write_shards(
    path: pathlib.Path,
    sizes: Mapping[str, int],
    get: Callable[[str], np.ndarray],
    max_shard_bytes: int | float,
) -> None:
    """model.safetensors, or numbered files and their index.

    Args:
      path: the folder.
      sizes: bytes of each tensor, in the order in which they are put into files.
      get: reads one; those of one file are held at a time.
      max_shard_bytes: of a file, unless one tensor alone is larger.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [
        f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    files = files if len(files) > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        # transformers wants to read "pt".
        arrays = {name: get(name) for name in names}
        _trees.write(path / file, arrays, {"format": "pt"})
    if len(files) > 1:
        weight_map = {
            name: file
            for file, names in zip(files, shards, strict=True)
            for name in names
        }
        index = dict(
            metadata=dict(total_size=sum(sizes.values())), weight_map=weight_map
        )
        write_json(path / INDEX, index)


def write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
