"""Parameters loaded into their shards."""

import dataclasses

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_same
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gdn_jax import models
from gdn_jax.models import cover, files, parameters

saved = checkpoints.saved


def mesh_of(*names, kind=AxisType.Auto):
    shape = (1,) * (len(names) - 1) + (4,)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def test_mesh(saved):
    folder, _, params = saved("next with experts")
    _, split = models.load(folder, mesh=mesh_of("data", "model"))
    assert_same(split, params)
    layer = split["layers_0"]
    assert layer["mixer"]["in_proj"]["qkvz"]["kernel"].sharding.spec == P(None, "model")
    assert layer["mixer"]["conv_weight"].sharding.spec == P(None, None)
    assert split["embed"]["embedding"].sharding.spec == P("model", None)
    experts = layer["mlp"]["experts_gate_up"]
    assert experts.sharding.spec == P("model", None, None)
    assert {x.data.shape for x in experts.addressable_shards} == {(1, 16, 12)}
    # ten features on four devices
    assert layer["mlp"]["shared"]["gate"]["kernel"].sharding.spec == P(None, None)


def test_a_model_on_a_mesh(saved):
    folder, model, params = saved("3.5 tied")
    _, split = models.load(folder, mesh=mesh_of("model"))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    run = jax.jit(lambda params: model.apply({"params": params}, tokens))
    got, want = run(split), run(params)
    np.testing.assert_allclose(got, want, atol=1e-5 * jnp.abs(want).max())


def test_axes_of_a_mesh_of_other_names(saved):
    folder, _, params = saved("next")
    axes = dict(mlp="columns", vocab=None)
    _, split = models.load(folder, mesh=mesh_of("columns"), axes=axes)
    assert_same(split, params)
    assert split["layers_0"]["mlp"]["up"]["kernel"].sharding.spec == P(None, "columns")
    assert split["embed"]["embedding"].sharding.spec == P(None, None)


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (dict(names=("data",)), "mesh must be one with 'model'.*axes=dict"),
        (dict(names=("model",), kind=AxisType.Explicit), "of axis type Auto"),
    ],
)
def test_wrong_mesh(saved, mesh, text):
    names = mesh.pop("names")
    with pytest.raises(ValueError, match=text):
        models.load(saved("next")[0], mesh=mesh_of(*names, **mesh))


def test_only_the_part_wanted_is_read(saved):
    folder, model, params = saved("next with experts")
    targets = parameters.find_targets(model)
    pieces = cover.cover(files.read_folder(folder), targets, fused=False, tied=False)
    reads = []

    class Recorder:
        def __init__(self, slices):
            self.slices = slices

        def __getitem__(self, region):
            reads.append(self.slices[region])
            return reads[-1]

    path = "layers_1/mlp/experts_gate_up"
    watched = [
        dataclasses.replace(
            piece,
            tensor=dataclasses.replace(
                piece.tensor, slices=Recorder(piece.tensor.slices)
            ),
        )
        for piece in pieces[path]
    ]
    index = slice(1, 3), slice(0, 8), slice(4, 8)  # two of the gate's, two of up's
    got = cover.read(watched, targets[path], index)
    np.testing.assert_array_equal(got, flatten_dict(params, sep="/")[path][index])
    assert sum(x.size for x in reads) == got.size and len(reads) == 4
