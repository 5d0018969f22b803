"""Small models in folders, for the tests of checkpoints; no tests of its own."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from gdn_jax import models
from gdn_jax.models import parameters

DENSE = dict(
    vocab_size=48,
    hidden_size=16,
    layer_types=("linear_attention", "full_attention"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
    intermediate_size=24,
    eos_token_id=(7,),
)
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    shared_expert_intermediate_size=10,
)
# name: model_type, other fields, dtype
MODELS = {
    "next": ("qwen3_next", dict(num_mtp_layers=1), "float32"),
    "next with experts": ("qwen3_next", EXPERTS | dict(num_mtp_layers=1), "bfloat16"),
    "3.5": ("qwen3_5_text", dict(num_mtp_layers=2), "bfloat16"),
    "3.5 tied": ("qwen3_5_text", dict(tie_word_embeddings=True), "float32"),
    "3.5 with experts": ("qwen3_5_moe_text", EXPERTS, "float32"),
    "3.5 with experts and MTP": (
        "qwen3_5_moe_text",
        EXPERTS | dict(num_mtp_layers=1),
        "bfloat16",
    ),
}
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
CONV = "model.layers.0.linear_attn.conv1d.weight"


def make(name):
    model_type, fields, dtype = MODELS[name]
    config = models.Config(**DENSE | fields | dict(model_type=model_type))
    model = models.Model(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=target.shape), target.dtype)
        for path, target in parameters.find_targets(model).items()
    }
    return model, unflatten_dict(params, sep="/")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name -> (folder, model, params); folders are not to be written to."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            model, params = make(name)
            models.save(folder, model, params)
            made[name] = folder, model, params
        return made[name]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved(name)[0], tmp_path / "copied")

    return copy


def assert_same(got, want):
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for path, x in want.items():
        assert got[path].dtype == x.dtype, path
        np.testing.assert_array_equal(got[path], x, path)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def edit_json(folder, file="config.json", **changed):
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changed))
