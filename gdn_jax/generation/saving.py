"""An engine in a file: its state, and beside it what its host knows."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from gdn_jax import _trees
from gdn_jax.generation.requests import Figures, Request
from gdn_jax.generation.sizes import Sizes
from gdn_jax.generation.state import EngineState, init_state
from gdn_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Notes:
    """What an engine has on its host.

    Attributes:
      model: its fingerprint.
      sizes: of the engine.
      requests: that are not finished, in the order in which they get their turn.
      figures: its counts.
      submitted: how many requests there have been.
    """

    model: dict[str, Any]
    sizes: Sizes
    requests: list[Request]
    figures: Figures
    submitted: int


def fingerprint(model: Model) -> dict[str, Any]:
    """What a state depends on, as JSON gives it back."""
    dtype = dict(dtype=jax.numpy.dtype(model.dtype).name)
    return json.loads(json.dumps(dataclasses.asdict(model.config) | dtype))


def save(path: str | os.PathLike[str], state: EngineState, notes: Notes) -> None:
    _trees.save(pathlib.Path(path), state, dict(engine=dataclasses.asdict(notes)))


def load_notes(path: str | os.PathLike[str], model: Model) -> Notes:
    notes = _trees.load_notes(pathlib.Path(path)).get("engine")
    if notes is None:
        raise ValueError(f"{path} holds no engine. Engine.save writes such files.")
    wanted, got = fingerprint(model), notes["model"]
    faults = [
        f"{name} is {wanted.get(name)!r}, was {got.get(name)!r}"
        for name in sorted(wanted | got)
        if wanted.get(name) != got.get(name)
    ]
    if faults:
        raise ValueError(
            f"{path} was saved with another model: {'; '.join(faults)}. Give the one "
            "that it was saved with."
        )
    notes["sizes"] = Sizes(**notes["sizes"])
    notes["figures"] = Figures(**notes["figures"])
    notes["requests"] = [_request(fields) for fields in notes["requests"]]
    return Notes(**notes)


def load_state(path: str | os.PathLike[str], model: Model, sizes: Sizes) -> EngineState:
    like = jax.eval_shape(lambda: init_state(model, sizes))
    return _trees.load(pathlib.Path(path), like)[0]


def _request(fields: dict[str, Any]) -> Request:
    tuples: dict[str, Any] = {name: tuple(fields[name]) for name in ("prompt", "stop")}
    return Request(**fields | tuples)
