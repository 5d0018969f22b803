"""An engine in a file: its state, and beside it what its host knows."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from gdn_jax import _trees
from gdn_jax.generation import saved
from gdn_jax.generation.requests import Figures, Request
from gdn_jax.generation.sizes import Sizes
from gdn_jax.generation.state import EngineState, init_state
from gdn_jax.models.sharded import AnyModel, ShardedModel
from gdn_jax.ops import checks


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


def fingerprint(model: AnyModel) -> dict[str, Any]:
    """What a state depends on, as JSON gives it back."""
    others: dict[str, Any] = dict(dtype=jax.numpy.dtype(model.dtype).name)
    if isinstance(model, ShardedModel) and model.split is not None:
        others["parts"] = model.split.parts  # by which the state's channels lie
    return json.loads(json.dumps(dataclasses.asdict(model.config) | others))


def save(path: str | os.PathLike[str], state: EngineState, notes: Notes) -> None:
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
        raise NotImplementedError(
            "an engine whose state lies on other processes' devices too cannot be "
            "saved. Keep its requests, and submit them to a new one."
        )
    _trees.save(pathlib.Path(path), state, dict(engine=dataclasses.asdict(notes)))


def load_notes(path: str | os.PathLike[str], model: AnyModel) -> Notes:
    """
    Raises:
      FileNotFoundError: no such file.
      ValueError: it is another program's or another model's, or holds what no engine
        can: its sizes are those of the state beside them, its requests could be asked.
    """
    path = pathlib.Path(path)
    notes = _trees.load_notes(path).get("engine")
    if notes is None:
        raise ValueError(f"{path} holds no engine. Engine.save writes such files.")
    try:
        notes = saved.fields_of(Notes, notes)
        if faults := _differences(fingerprint(model), notes["model"]):
            raise ValueError(
                f"it was saved with another model: {checks.listed(faults)}. Give the "
                "one that it was saved with."
            )
        sizes = saved.read_sizes(notes["sizes"], model, path.stat().st_size)
        requests, submitted = notes["requests"], notes["submitted"]
        return Notes(
            notes["model"],
            sizes,
            saved.read_requests(requests, submitted, model.config, sizes),
            saved.read_figures(notes["figures"]),
            submitted,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_state(
    path: str | os.PathLike[str], model: AnyModel, notes: Notes
) -> EngineState:
    """
    Raises:
      ValueError: it is none of such an engine, or not that of its requests.
    """
    like = jax.eval_shape(lambda: init_state(model, notes.sizes))
    place = model.shardings(like) if isinstance(model, ShardedModel) else None
    state = _trees.load(pathlib.Path(path), like, place)[0]
    vocab_size = model.config.vocab_size
    if faults := saved.faults_of_state(state, notes.sizes, notes.requests, vocab_size):
        raise ValueError(f"{path}: {checks.listed(faults)}. {saved.REMEDY}")
    return state


def _differences(wanted: dict[str, Any], got: Any) -> list[str]:
    if not isinstance(got, dict):
        return [f"model is {checks.shown(got)}"]
    return [
        f"{name} is {checks.shown(wanted.get(name))}, was {checks.shown(got.get(name))}"
        for name in sorted(wanted | got)
        if wanted.get(name) != got.get(name)
    ]
