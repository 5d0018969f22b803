"""Which parameters a model has, and whether a tree has them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict

from gdn_jax.models.config import Config
from gdn_jax.models.cover import Target, listed
from gdn_jax.models.model import Model
from gdn_jax.ops import checks

Params = dict[str, Any]
Kind = tuple[str, bool]  # of a layer: its mixer, and whether it has experts
# Models can be hashed, which their type does not say.
_cached: Any = functools.lru_cache(maxsize=16)


@_cached
def find_targets(model: Model) -> dict[str, Target]:
    """Each parameter, by its path.

    Layers of a kind have the same ones, so that one of each kind is traced: a deep
    model is slow to trace, and a broken checkpoint may claim to be deep.
    """
    config = model.config
    kinds = [(mixer, config.is_sparse(i)) for i, mixer in enumerate(config.layer_types)]
    mtp = [
        ("full_attention", config.is_sparse(i)) for i in range(config.num_mtp_layers)
    ]
    each = list(dict.fromkeys(kinds + mtp))
    targets, of_kind = {}, {kind: {} for kind in each}
    for path, target in _trace(model.clone(config=_of_kinds(config, each))).items():
        layer, _, rest = path.partition("/")
        if layer.startswith("layers_"):
            of_kind[each[int(layer.removeprefix("layers_"))]][rest] = target
        elif not path.startswith("mtp/layers_"):
            targets[path] = target
    for prefix, layers in (("layers_", kinds), ("mtp/layers_", mtp)):
        for i, kind in enumerate(layers):
            parts = of_kind[kind].items()
            targets |= {f"{prefix}{i}/{rest}": target for rest, target in parts}
    return targets


def _of_kinds(config: Config, kinds: list[Kind]) -> Config:
    """With a layer of each."""
    return dataclasses.replace(
        config,
        layer_types=tuple(mixer for mixer, _ in kinds),
        decoder_sparse_step=1,
        mlp_only_layers=tuple(i for i, (_, sparse) in enumerate(kinds) if not sparse),
        num_mtp_layers=min(config.num_mtp_layers, 1),
    )


def _trace(model: Model) -> dict[str, Target]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return {
        path: Target(box.value.shape, np.dtype(box.value.dtype), box.names)
        for path, box in _flat(boxes).items()
    }


def check_params(model: Any, params: Any) -> dict[str, jax.Array]:
    """Each parameter, by its path and out of its box.

    Raises:
      ValueError: this is no model, or these are not its parameters; every fault is
        listed.
    """
    remedy = "Give model and params as models.load does, in this order."
    if not isinstance(model, Model):
        checks.fail("model", _type(model), "a gdn_jax.models.Model", remedy)
    return check_arrays(params, find_targets(model), remedy)


def check_arrays(
    params: Any, targets: Mapping[str, Target], remedy: str
) -> dict[str, jax.Array]:
    """As `check_params`, of these parameters."""
    if not isinstance(params, dict | FrozenDict):
        checks.fail("params", _type(params), "a tree of parameters", remedy)
    if params.keys() == {"params"}:
        remedy = "Give params['params']."
        checks.fail("params", "it under 'params'", "the tree of parameters", remedy)
    arrays = nn.meta.unbox(_flat(params))
    faults = [f"{path} is missing" for path in targets.keys() - arrays.keys()]
    faults += [f"{path} is no parameter" for path in arrays.keys() - targets.keys()]
    for path in arrays.keys() & targets.keys():
        shape = getattr(arrays[path], "shape", None)
        dtype = getattr(arrays[path], "dtype", None)
        if shape is None or dtype is None:
            faults.append(f"{path} is {_type(arrays[path])}, wanted an array")
            continue
        if shape != targets[path].shape:
            faults.append(f"{path} is {shape}, wanted {targets[path].shape}")
        if dtype.name not in checks.FLOATS:
            faults.append(f"{path} is {dtype}, wanted {' or '.join(checks.FLOATS)}")
    if faults:
        raise ValueError(f"params are not this model's: {listed(faults)}. {remedy}")
    return arrays


def _flat(tree: Any) -> dict[str, Any]:
    """By paths, whatever the keys are."""
    flat = flatten_dict(unfreeze(tree))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def _type(x: Any) -> str:
    return f"a {type(x).__name__}"
