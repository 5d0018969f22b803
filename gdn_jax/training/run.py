"""A training run in a folder: its state, its loss curve, and the model it ends with."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax import _trees, models
from gdn_jax.models import Config, Model
from gdn_jax.ops import checks
from gdn_jax.training import train
from gdn_jax.training.recipe import Recipe
from gdn_jax.training.text import Corpus
from gdn_jax.training.train import TrainState

STATE = "state.safetensors"
CURVE = "curve.json"


def run(
    config: Config,
    recipe: Recipe,
    corpus: Corpus,
    folder: pathlib.Path,
    *,
    on_progress: Callable[[int, dict[str, Any]], None] = lambda step, point: None,
    every: int = 50,
    save_every: int = 500,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Trains a model, or goes on with one of the same recipe that is in the folder.

    The folder gets state.safetensors (what a run that was killed goes on from, every
    `save_every` steps), curve.json, and in the end the model in bfloat16 (config.json,
    model.safetensors).

    Args:
      config, recipe, corpus: a run is a function of these.
      folder: made if need be.
      every: steps of a call, and of a point of the curve.
      save_every: steps between saves of the state.
      on_progress: called with the steps taken and the curve's last point.
      dtype: of activations.

    Returns:
      What curve.json has: the recipe, the text's hashes, points of mean losses in bits
      per byte, and the bits per byte of the held-out text by the model as saved.

    Raises:
      ValueError: the folder has a run of another recipe, text or model; or the text is
        shorter than a window.
    """
    checks.float_dtype("dtype", dtype, "It is the activations'.")
    window = recipe.length + 1 + recipe.drafts
    if len(corpus.train) < window:
        remedy = "Take a longer text or shorter windows."
        got, wanted = f"{len(corpus.train)} bytes", f"at least a window, {window} bytes"
        checks.fail("corpus.train", got, wanted, remedy)
    model = Model(config, dtype=dtype)
    state = train.init(model, recipe)
    curve: dict[str, Any] = dict(
        recipe=dataclasses.asdict(recipe),
        config=config.to_hf(),
        python=corpus.python,
        sha256=list(corpus.sha256),
        dtype=jnp.dtype(dtype).name,
        points=[],
    )
    if (folder / STATE).exists():
        state, curve = resume(folder, state, curve)
    text = jnp.asarray(np.frombuffer(corpus.train, np.uint8))
    taken = int(state.step)
    while taken < recipe.steps:
        steps = min(every, recipe.steps - taken)
        state, losses = train.train(model, recipe, state, text, steps)
        taken += steps
        curve["points"].append(
            dict(
                step=taken,
                next=float(jnp.mean(losses.next)),
                drafts=jnp.mean(losses.drafts, axis=0).tolist(),
            )
        )
        on_progress(taken, curve["points"][-1])
        if taken % save_every < steps or taken == recipe.steps:
            _trees.save(folder / STATE, state, curve)
    return finish(model, state, corpus, folder, curve)


def resume(
    folder: pathlib.Path, state: TrainState, curve: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    path = folder / STATE
    kept, old = _trees.load(path, state)
    differ = [key for key in curve if key != "points" and curve[key] != old.get(key)]
    if differ:
        raise ValueError(
            f"{folder} has a run of another {' and '.join(differ)}. Take another "
            "folder, or delete it to begin anew."
        )
    taken, steps = int(kept.step), curve["recipe"]["steps"]
    if not isinstance(old.get("points"), list) or not 0 <= taken <= steps:
        raise ValueError(
            f"{path} is broken: it says {taken} of {steps} steps, and of its points "
            f"{checks.shown(old.get('points'))}. Delete it to begin anew."
        )
    return kept, old


def finish(
    model: Model,
    state: TrainState,
    corpus: Corpus,
    folder: pathlib.Path,
    curve: dict[str, Any],
) -> dict[str, Any]:
    """Saves the averaged parameters, and measures them as saved, in float32."""
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, state.average
    )
    models.save(folder, model.clone(param_dtype=jnp.bfloat16), half)
    model, params = models.load(folder, dtype=jnp.float32, progress=False)
    curve["device"], curve["jax"] = jax.devices()[0].device_kind, jax.__version__
    curve["held_out_bits_per_byte"] = train.bits_per_byte(
        model, params, corpus.held_out
    )
    (folder / CURVE).write_text(json.dumps(curve, indent=1) + "\n")
    return curve
