"""Hugging Face's folders: loading a model from one, and saving it to one."""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from gdn_jax import sharding
from gdn_jax.models import config_file, cover, files, placement, rules
from gdn_jax.models.config import Config
from gdn_jax.models.cover import Target
from gdn_jax.models.files import Folder
from gdn_jax.models.model import Model
from gdn_jax.models.parameters import Params, check_params, find_targets
from gdn_jax.models.placement import AXES
from gdn_jax.models.sharded import ShardedModel
from gdn_jax.ops import checks
from gdn_jax.sharding.grid import MeshAxes, check_mesh

GENERATION = "generation_config.json"


def load(
    path: str | pathlib.Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    axes: Mapping[str, MeshAxes] = AXES,
    progress: bool | None = None,
) -> tuple[Model, Params]:
    """A model and its parameters from a folder as Hugging Face has them.

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import models
        >>> model, params = models.load(models.SMALL, progress=False)
        >>> tokens = jnp.array([[100, 101, 102]])
        >>> jax.jit(model.apply)({"params": params}, tokens).shape   # N, T, vocabulary
        (1, 3, 256)

    The folder holds config.json and model.safetensors, or numbered files with their
    index. Of a multimodal checkpoint the text model is taken. There are as many layers
    of multi-token prediction as there are tensors for, whatever config.json says, since
    transformers saves none. Tokens that end a text are generation_config.json's, if it
    names any.

    Parameters are read one at a time, and no second copy of them is held; on a mesh, of
    each file only the parts that this process's devices get. None is made before all of
    the files' shapes are known to be those of config.json's model. Nothing in a folder
    is run, and files outside of it are read only where its own are links to them.

    Args:
      path: the folder.
      dtype: float32, bfloat16 or float16, of parameters and activations; A_log and
        dt_bias are float32 always. None: the embedding's, also of those that the
        folder has in another.
      mesh: devices to split the parameters between, with axes of type Auto. None: all
        are put on the default device.
      axes: which of the parameters' logical axes is split over which of the mesh's, in
        order of precedence. One that cannot be split evenly is whole on every device.
      progress: whether to show a bar. None: on a terminal.

    Returns:
      model: whose `config` is what the folder holds.
      params: as `model.init(..)["params"]`, unboxed.

    Raises:
      FileNotFoundError: there is no such folder, or not these files in it.
      ValueError: config.json has keys or values that are not known; or tensors are
        missing, too many, twice, of other shapes or dtypes, or files are broken. Each
        lists every fault. Or an index names what is no file of the folder; or the mesh
        lacks an axis.
      MemoryError: the devices have too little memory.
    """
    if mesh is not None:
        check_mesh(mesh, axes)

    def place(name: str, target: Target, read: Read) -> jax.Array:
        if mesh is None:
            return jax.device_put(read())
        sharding = placement.find_sharding(mesh, axes, target.names, target.shape)
        return jax.make_array_from_callback(target.shape, sharding, read)

    return _load(path, dtype, progress, lambda model: (model, place))


def load_sharded(
    path: str | pathlib.Path,
    mesh: Mesh,
    *,
    dtype: Any = None,
    axes: Mapping[str, MeshAxes] = sharding.AXES,
    progress: bool | None = None,
) -> tuple[ShardedModel, Params]:
    """As `load`, but a `ShardedModel`, whose kernels run on every device of the mesh.

    Parameters are read straight into the parts that devices have: no device holds all
    of one that they share, and no process reads another's. Channels and heads lie in
    the order of those parts, so that they are this model's alone: a plain `Model` would
    take them, of equal shapes as they are, and be wrong.

    Args:
      path, dtype, progress: as in `load`.
      mesh: with axes of type Auto, such as `sharding.make_mesh` makes.
      axes: which logical axis is split over which of the mesh's.

    Raises:
      ValueError: as in `load`; or the devices cannot share the model out, with the
        sizes of the mesh that could.
      FileNotFoundError, MemoryError: as in `load`.
    """

    def begin(model: Model) -> tuple[ShardedModel, Place]:
        shared = ShardedModel(model, mesh, axes)
        return shared, shared.place

    return _load(path, dtype, progress, begin)


Read = Callable[..., np.ndarray]  # of a parameter, or of a region of it
Place = Callable[[str, Target, Read], jax.Array]
AnyModel = TypeVar("AnyModel", Model, ShardedModel)


def _load(
    path: str | pathlib.Path,
    dtype: Any,
    progress: bool | None,
    begin: Callable[[Model], tuple[AnyModel, Place]],
) -> tuple[AnyModel, Params]:
    """`begin` makes of the model what comes back, and says where parameters go."""
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}. Download the model's files there.")
    config = _with_ends(Config.from_hf(path), path)
    folder = files.read_folder(path)
    names = [rules.canonical(tensor.name) for tensor in folder.tensors]
    names += map(rules.canonical, folder.lost or ())
    layers = rules.count_mtp_layers(names)
    dtype = _dtype_of(dtype, folder)
    try:
        config = dataclasses.replace(config, num_mtp_layers=layers)
        model = Model(config, dtype=dtype, param_dtype=dtype)
        targets = find_targets(model)
        pieces = cover.cover(
            folder,
            targets,
            fused=is_fused(config),
            tied=config.tie_word_embeddings,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found, place = begin(model)
    params = {}
    total = sum(target.nbytes for target in targets.values())
    with _bar(progress, f"loading {path.name}", total) as advance:
        for name, target in targets.items():
            read = functools.partial(cover.read, pieces[name], target)
            with checks.memory_errors(lambda: _too_large(path, total)):
                array = place(name, target, read)
                array.block_until_ready()  # until then the host holds it as well
                params[name] = array
            advance(target.nbytes)
    return found, unflatten_dict(params, sep="/")


def save(
    path: str | pathlib.Path,
    model: Model,
    params: Params,
    *,
    max_shard_bytes: int | float = 5e9,
) -> None:
    """Writes config.json and safetensors, as `load` and transformers read them.

    Everything is written beside the old files first, so that a save that is stopped
    leaves these as they were; one that is stopped while the new ones take their places
    leaves a folder that `load` refuses, and says what to do. Other files of the folder,
    a tokenizer's, stay; in a generation_config.json eos_token_id becomes the model's.

    Args:
      path: the folder; made if there is none.
      model, params: as from `load`, or trained; boxes of `model.init` are taken off.
        Parameters are written in their own dtypes.
      max_shard_bytes: of a file. So much is held on the host at a time.

    Raises:
      ValueError: params are not the model's; every fault is listed.
      NotADirectoryError: path is a file.
    """
    arrays = check_params(model, params)
    if not isinstance(max_shard_bytes, int | float) or not max_shard_bytes > 0:
        remedy = "It is the bytes of a file."
        checks.fail("max_shard_bytes", repr(max_shard_bytes), "a number > 0", remedy)
    if (path := pathlib.Path(path)).exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file. Name a folder to save to.")
    sources = {
        source.name: (path, source)
        for path, array in arrays.items()
        for source in rules.sources_of(path, array.shape, is_fused(model.config))
    }
    sizes = {
        name: int(np.prod(source.shape)) * arrays[path].dtype.itemsize
        for name, (path, source) in sorted(sources.items(), key=_numbers_in_order)
    }

    @functools.lru_cache(maxsize=2)  # the experts' two are read in turns
    def on_host(path: str) -> np.ndarray:
        # A copy's: JAX keeps what it brought to the host as long as the array.
        return np.asarray(jnp.copy(arrays[path]))

    def get(name: str) -> np.ndarray:
        path, source = sources[name]
        return np.ascontiguousarray(source.to_source(on_host(path)))

    with files.replacing(pathlib.Path(path)) as new:
        dtype = arrays["embed/embedding"].dtype.name
        files.write_json(new / "config.json", model.config.to_hf() | dict(dtype=dtype))
        if (old := pathlib.Path(path) / GENERATION).is_file():
            eos = dict(eos_token_id=list(model.config.eos_token_id) or None)
            files.write_json(new / GENERATION, config_file.read(old) | eos)
        files.write_shards(new, sizes, get, max_shard_bytes)


def is_fused(config: Config) -> bool:
    """Whether published checkpoints have all experts in one tensor."""
    return config.model_type == "qwen3_5_moe_text"


def _too_large(path: pathlib.Path, total: int) -> str:
    return (
        f"the device has too little memory for the {total / 1e9:.3g} GB of {path}. "
        "Load them in bfloat16, on a mesh of several devices, or load a smaller model."
    )


@contextlib.contextmanager
def _bar(
    progress: bool | None, text: str, total: int
) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, and what moves it on."""
    console = Console(stderr=True)
    show = console.is_terminal if progress is None else progress
    columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not show) as bar:
        yield functools.partial(bar.advance, bar.add_task(text, total=total))


def _dtype_of(dtype: Any, folder: Folder) -> np.dtype:
    if dtype is None:
        names = {
            rules.canonical(x.name): files.DTYPES.get(x.dtype) for x in folder.tensors
        }
        dtype = names.get("model.embed_tokens.weight") or "float32"
    return checks.float_dtype("dtype", dtype, "None: as saved.")


def _with_ends(config: Config, path: pathlib.Path) -> Config:
    """With those where transformers stops to generate, if a file says so."""
    path = path / GENERATION
    found = config_file.read(path).get("eos_token_id") if path.exists() else None
    if found in (None, []):
        return config
    try:
        return dataclasses.replace(config, eos_token_id=config_file.as_tuple(found))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _numbers_in_order(item: tuple[str, Any]) -> str:
    """Layer 2 before layer 10, so that a file has layers one after another."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), item[0])
