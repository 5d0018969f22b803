"""Trees of arrays in one safetensors file, replaced whole or not at all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax import _json
from gdn_jax.ops import checks

NOTES = "gdn_jax"  # the key of the file's metadata that holds ours
# NumPy's names of safetensors' dtypes, of those that a tree may have.
DTYPES = dict(
    BOOL="bool",
    U8="uint8",
    I8="int8",
    U16="uint16",
    I16="int16",
    U32="uint32",
    I32="int32",
    U64="uint64",
    I64="int64",
    F16="float16",
    BF16="bfloat16",
    F32="float32",
    F64="float64",
)


def save(path: pathlib.Path, tree: Any, notes: dict[str, Any]) -> None:
    """Writes a tree and JSON notes beside it. A write that is cut off leaves the old
    file.

    Raises:
      IsADirectoryError, NotADirectoryError: no file can be there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Name a file in it to save to.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        text = f"{path} can be no file, since {above} is no folder. Save elsewhere."
        raise NotADirectoryError(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: _plain(x) for name, x in _named(tree).items()}
    beside = path.with_name(path.name + ".partial")
    write(beside, arrays, {NOTES: json.dumps(notes)})
    on_disk(beside)
    os.replace(beside, path)
    on_disk(path.parent)


def write(path: pathlib.Path, arrays: Any, metadata: dict[str, str]) -> None:
    """A safetensors file that may be read by whom the umask lets; the package's own are
    their owner's alone."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata)
    path.chmod(mode)


def on_disk(path: pathlib.Path) -> None:
    """Waits until a file, or what a folder says of its files, outlasts a loss of
    power: a name may otherwise be there before what it names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def load_notes(path: pathlib.Path) -> dict[str, Any]:
    """The notes; {} if the file is another program's.

    Raises: as `load`, but for differences.
    """
    with opened(path) as file:
        text = (file.metadata() or {}).get(NOTES, "{}")
    try:
        return _json.parse(text)
    except ValueError as error:
        text = f"{path} has broken notes ({error}). Take another copy of it."
        raise ValueError(text) from None


def load(
    path: pathlib.Path, like: Any, place: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The tree, of the structure, shapes and dtypes of `like`, and the notes.

    Args:
      like: a tree of arrays or of `jax.ShapeDtypeStruct`.
      place: a tree of shardings, of where each array goes from the host; None: to the
        default device.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no such tree's file; every difference is listed. An array of
        another shape is not read.
    """
    wanted = _named(like)
    places = [None] * len(wanted) if place is None else jax.tree.leaves(place)
    faults, arrays = [], []
    with opened(path) as file:
        names = set(file.keys())
        surplus = sorted(names - set(wanted))
        faults += [f"{name} is not expected" for name in surplus]
        for (name, x), where in zip(wanted.items(), places, strict=True):
            if name not in names:
                faults.append(f"{name} is missing")
                continue
            found, plain = file.get_slice(name), _plain_type(x)
            dtype: str = found.get_dtype()
            got = _words(DTYPES.get(dtype, dtype), found.get_shape())
            if got == (words := _words(plain.dtype.name, plain.shape)):
                arrays.append(_like(file.get_tensor(name), x, where))
            else:
                faults.append(f"{name} is {got}, wanted {words}")
    if faults:
        raise ValueError(
            f"{path} is of another model or of other sizes: {checks.listed(faults)}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), arrays), load_notes(path)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
    """The file by `safe_open`, whose errors name it."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"no {path}; nothing was saved there.")
    if not path.is_file():  # opening a FIFO would wait for its other end
        raise ValueError(f"{path} is no file. Name what was saved.")
    try:
        with safe_open(path, "np") as file:
            yield file
    except SafetensorError as error:
        reason = checks.cut(str(error))
        text = f"{path} is cut off or no safetensors file: {reason}"
        raise ValueError(text) from None


def _named(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _words(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}{list(shape)}"


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x, order="C")


def _plain_type(x: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x


def _like(got: np.ndarray, x: Any, where: Any) -> jax.Array:
    if where is None:
        found = jnp.asarray(got)
    else:  # each process its own devices' parts
        found = jax.make_array_from_callback(got.shape, where, lambda own: got[own])
    return jax.random.wrap_key_data(found, impl=_impl(x)) if _is_key(x) else found


def _impl(keys: Any) -> str:
    """Of keys, or of their shape alone, which is enough within a trace."""
    found = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), keys)
    return found[0]
