"""What XLA is told where GPUs sum what each has."""

import dataclasses
import types
from unittest import mock

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from meshes import mesh_of, shared_of

from gdn_jax import Engine
from gdn_jax.models import ShardedModel
from gdn_jax.sharding import compiling

pytestmark = pytest.mark.once

IS_NEW = jax.__version_info__ >= compiling.FIRST_JAX
KIND = next(iter(compiling.MEASURED))


def _mesh(*devices):
    made = [types.SimpleNamespace(device_kind=k, process_index=p) for k, p in devices]
    return mock.Mock(spec=Mesh, devices=np.array(made, object), size=len(made))


def test_it_is_told_where_it_was_measured():
    measured = compiling.options_of(_mesh((KIND, 0), (KIND, 0)))
    assert measured == (compiling.IN_GRAPHS if IS_NEW else {})


@pytest.mark.parametrize(
    "devices",
    [
        [(KIND, 0)],
        [(KIND, 0), (KIND, 1)],
        [(KIND, 0), ("another", 0)],
        [("another", 0)] * 2,
    ],
    ids=["one", "two processes", "two kinds", "not measured"],
)
def test_elsewhere_xla_chooses(devices):
    assert compiling.options_of(_mesh(*devices)) == {}


def test_xla_knows_them():
    told = compiling.options_of(_mesh((KIND, 0), (KIND, 0)))
    compiled = jax.jit(jnp.sin).lower(1.0).compile(told)
    assert compiled(1.0) == jnp.sin(1.0)


def test_a_model_tells_it_where_it_has_sums(monkeypatch):
    [kind] = {device.device_kind for device in jax.devices()}
    monkeypatch.setattr(compiling, "MEASURED", {kind: compiling.IN_GRAPHS})
    whole, _ = engines.make()
    wanted = tuple(sorted(compiling.IN_GRAPHS.items())) if IS_NEW else ()
    assert ShardedModel(whole, mesh_of(1, 2)).decoding_options == wanted
    assert ShardedModel(whole, mesh_of(2, 2)).decoding_options == wanted
    assert ShardedModel(whole, mesh_of(2, 1)).decoding_options == ()
    own = ShardedModel(whole, mesh_of(1, 2), compiler_options={})
    assert own.decoding_options == ()


def test_an_engine_decodes_with_what_its_model_tells():
    shared, params = shared_of("dense", 1, 2)
    texts, asked = [], dict(max_tokens=5, stop=())
    for options in ({}, {"xla_disable_hlo_passes": "algsimp"}):
        model = dataclasses.replace(shared, compiler_options=options)
        engine = Engine(model, params, **engines.SIZES)
        requests = engines.write(engine, engines.PROMPTS, **asked)
        texts.append(engines.tokens(requests))
    assert texts[0] == texts[1]
    model = dataclasses.replace(shared, compiler_options={"xla_is_not_told": 1})
    engine = Engine(model, params, **engines.SIZES)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_is_not_told"):
        engines.write(engine, engines.PROMPTS, **asked)
