"""Training: a run killed and resumed, what is refused, what the shipped model knows."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax import models
from gdn_jax.training import run, text, train
from gdn_jax.training.recipe import SMALL, Recipe

TINY = dataclasses.replace(
    SMALL,
    hidden_size=16,
    layer_types=("linear_attention", "full_attention"),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    intermediate_size=24,
)
RECIPE = Recipe(steps=6, batch=2, length=24, drafts=2)
CORPUS = text.Corpus(b"def f():\n    pass\n\0" * 40, b"def g():\n    pass\n\0" * 4, "3")


class Killed(Exception):
    pass


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_in(folder)


def train_in(folder, recipe=RECIPE, corpus=CORPUS, **keywords):
    return run.run(TINY, recipe, corpus, folder, every=2, save_every=2, **keywords)


def test_a_killed_run_ends_as_it_would_have(whole, tmp_path):
    def kill(step, point):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train_in(tmp_path, on_progress=kill)
    assert not (tmp_path / "model.safetensors").exists()
    assert train_in(tmp_path) == whole[1]
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_run_leaves_a_model_and_its_curve(whole):
    folder, curve = whole
    assert json.loads((folder / run.CURVE).read_text()) == curve
    assert [point["step"] for point in curve["points"]] == [2, 4, 6]
    assert all(len(point["drafts"]) == RECIPE.drafts for point in curve["points"])
    model, params = models.load(folder, dtype=jnp.float32)
    assert model.config == TINY
    bits = train.bits_per_byte(model, params, CORPUS.held_out)
    assert bits == pytest.approx(curve["held_out_bits_per_byte"])


def test_losses_fall(tmp_path):
    points = train_in(tmp_path, dataclasses.replace(RECIPE, steps=40))["points"]
    assert points[-1]["next"] < points[0]["next"] - 1
    assert points[-1]["drafts"][-1] < points[0]["drafts"][-1]


@pytest.mark.parametrize(
    "change",
    [
        dict(recipe=dataclasses.replace(RECIPE, seed=1)),
        dict(corpus=dataclasses.replace(CORPUS, train=CORPUS.train + b"!")),
    ],
    ids=["recipe", "text"],
)
def test_another_run_in_the_folder_is_not_gone_on_with(whole, change):
    with pytest.raises(ValueError, match="another"):
        train_in(whole[0], **change)


@pytest.fixture(scope="module")
def trained(whole):
    """The model, its parameters, and logits of 50 tokens."""
    model, params = models.load(whole[0], dtype=jnp.float32)
    return model, params, jax.jit(functools.partial(model.apply, {"params": params}))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 50])
def test_bits_per_byte_counts_every_byte_once(trained, size):
    """However windows fall: with one that is longer than the text it is plain."""
    model, params, apply = trained
    data = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    tokens = jnp.array([[0, *data]])
    # what is behind a token is nothing to its logits
    logits = apply(jnp.pad(tokens[:, :-1], ((0, 0), (0, 50 - size))))[:, :size]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    want = float(nats.sum()) / size / np.log(2)
    assert train.bits_per_byte(model, params, data, stride=64) == pytest.approx(want)
    # Windows of 8 see less, but a model that has learned little does not miss it.
    short = train.bits_per_byte(model, params, data, stride=4, batch=2)
    assert short == pytest.approx(want, rel=0.05)


def test_dropped_weights_keep_their_mean():
    params = {"kernel": jnp.ones((200, 200)), "weight": jnp.ones(5)}
    dropped = train.drop_weights(params, 0.25, jax.random.key(0))
    assert set(np.unique(dropped["kernel"])) == {0, np.float32(1 / 0.75)}
    assert float(dropped["kernel"].mean()) == pytest.approx(1, abs=0.02)
    assert (dropped["weight"] == 1).all()


@pytest.mark.once
def test_the_shipped_model_beats_kneser_ney():
    """On part of the held-out text; the results file has the baseline on all of it."""
    model, params = models.load(models.SMALL, dtype=jnp.float32)
    assert model.config == SMALL
    assert (models.SMALL / "model.safetensors").stat().st_size < 4e6
    results = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
    order_6 = [
        row["bits_per_byte"]
        for row in json.loads((results / "held_out.json").read_text())["kneser_ney"]
        if row["order"] == 6
    ]
    sample = text.corpus().held_out[:6000]
    assert train.bits_per_byte(model, params, sample, batch=2) < min(order_6) - 0.2
