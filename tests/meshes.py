"""Meshes of the devices that there are, and models on them."""

import engines
import jax
import pytest

from gdn_jax import sharding
from gdn_jax.models import ShardedModel


def mesh_of(data, model):
    """CPUs are as many as conftest.py fakes, GPUs as many as a machine has."""
    if jax.default_backend() != "cpu" and jax.device_count() < data * model:
        pytest.skip(f"needs {data * model} devices")
    return sharding.make_mesh(data, model)


KINDS = {
    "dense": dict(vocab_size=52),
    "tied": dict(tie_word_embeddings=True),
    "experts": dict(
        model_type="qwen3_next",
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        intermediate_size=0,
    ),
}


def shared_of(kind, data, model):
    whole, params = engines.make(**KINDS[kind])
    shared = ShardedModel(whole, mesh_of(data, model))
    return shared, shared.shard(params)


def assert_lie_at(tree, shardings):
    def is_there(x, where):
        assert x.sharding.is_equivalent_to(where, x.ndim), (x.sharding, where)

    jax.tree.map(is_there, tree, shardings)
