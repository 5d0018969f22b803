"""Models, layers and engines that devices share out: as on one."""

import dataclasses
import functools

import checkpoints
import engines
import jax
import layers
import numpy as np
import pytest
from checkpoints import assert_same
from meshes import KINDS, assert_lie_at, mesh_of, shared_of

from gdn_jax import Engine, models, sharding, testing
from gdn_jax.models import ShardedModel, parameters
from gdn_jax.nn import ShardedLayer

saved = checkpoints.saved
pytestmark = pytest.mark.usefixtures("exact_products")

TOLERANCE = 1e-5


@functools.cache
def steps_of(kind):
    """The logits of a prompt, and of a token behind it."""
    whole, params = engines.make(**KINDS[kind])
    apply = jax.jit(whole.apply)
    state = whole.init_state(4, 16)
    prompt, state = apply({"params": params}, tokens(), state)
    step, _ = apply({"params": params}, tokens()[:, :1], state)
    return prompt, step


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def tokens():
    return jax.random.randint(jax.random.key(3), (4, 6), 0, 50)


# Of four devices two share a key head, and the heads of keys and values.
@pytest.mark.parametrize(
    ("kind", "data", "model"),
    [("dense", 2, 4), ("tied", 1, 2), ("experts", 1, 4), ("experts", 4, 2)],
)
def test_steps(kind, data, model):
    shared, params = shared_of(kind, data, model)
    want = steps_of(kind)
    apply = jax.jit(shared.apply, donate_argnums=2)
    state = shared.init_state(4, 16)
    got, state = apply({"params": params}, tokens(), state)
    assert testing.relative_error(got, want[0]) < TOLERANCE
    args = {"params": params}, tokens()[:, :1], state
    text = apply.lower(*args).compile().as_text()
    # Two a layer, and of a vocabulary that is shared out one of the embedding and one
    # of logits.
    vocab = int(shared.split.vocab)
    layers = len(shared.config.layer_types)
    wanted = {"all-reduce": 2 * layers + vocab} | ({"all-gather": 1} if vocab else {})
    assert testing.collectives(text) == wanted
    got, _ = apply(*args)
    assert testing.relative_error(got, want[1]) < TOLERANCE


def assert_gradients(shared, whole, params, loss):
    """As on one device, also of parameters that several devices have."""
    want = jax.jit(jax.grad(functools.partial(loss, whole)))(params)
    own = shared.shard(params)
    got = jax.jit(jax.grad(functools.partial(loss, shared)))(own)
    assert_lie_at(got, jax.tree.map(lambda x: x.sharding, own))
    for x, y in zip(*map(jax.tree.leaves, (got, shared.shard(want))), strict=True):
        assert testing.relative_error(np.asarray(x), np.asarray(y)) < 1e-4


# Of four devices two share a key head, and the heads of keys and values.
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("dense", (2, 2)), ("tied", (1, 4)), ("experts", (2, 2)), ("experts", (1, 4))],
)
def test_gradients_of_a_model(kind, mesh):
    whole, params = engines.make(**KINDS[kind], num_mtp_layers=0)

    def loss(model, params):
        logits = model.apply({"params": params}, tokens())
        return (jax.nn.log_softmax(logits)[..., 7] ** 2).mean()

    assert_gradients(ShardedModel(whole, mesh_of(*mesh)), whole, params, loss)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("Qwen3.5", (2, 2)), ("Qwen3-Next", (2, 4)), ("Kimi-Linear", (1, 4))],
)
def test_gradients_of_a_layer(kind, mesh):
    layer, params = layers.make(kind)

    def loss(layer, params):
        y, state = layer.apply({"params": params}, layers.tokens(2, 5))
        return (y**2).sum() + (state.recurrent**2).sum()

    shared = ShardedLayer(layer, mesh_of(*mesh))
    assert_gradients(shared, layer, params["params"], loss)


def test_rows_of_groups():
    """Each group's rows are of its part of the state."""
    shared, params = shared_of("dense", 2, 2)
    whole, own = engines.make(**KINDS["dense"])
    rows = np.array([1, 2], np.int32)
    got, want = [], []
    for model, variables, found in ((shared, params, got), (whole, own, want)):
        apply, state = jax.jit(model.apply), model.init_state(4, 16)
        for piece in (tokens()[:2], tokens()[2:]):
            logits, state = apply({"params": variables}, piece, state, rows=rows)
        found += [logits, state.length]
    np.testing.assert_array_equal(got[1], want[1])
    assert testing.relative_error(got[0], want[0]) < TOLERANCE


def test_rows_of_another_group_are_null():
    shared, params = shared_of("dense", 2, 1)
    state = shared.init_state(4, 16)
    rows = np.array([1, 0], np.int32)  # the second is the first group's
    apply = jax.jit(shared.apply)
    _, new = apply({"params": params}, tokens()[:2], state, rows=rows)
    np.testing.assert_array_equal(new.length, [0, 6, 0, 0])
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(x[2:], y[2:])


def test_a_state_by_its_name():
    shared, params = shared_of("dense", 2, 2)
    variables, state = {"params": params}, shared.init_state(4, 16)
    logits, new = jax.jit(shared.apply)(variables, tokens(), state)
    rows = np.arange(4, dtype=np.int32)
    keywords = dict(state=state, rows=rows)
    named, also = jax.jit(shared.apply)(variables, tokens(), **keywords)
    assert_equal((named, also), (logits, new))
    hidden = jax.jit(functools.partial(shared.apply, method="hidden"))
    x, _ = hidden(variables, tokens(), **keywords)
    draft = jax.jit(functools.partial(shared.apply, method="draft"))
    args = variables, tokens(), x
    cache, start = shared.init_draft_cache(4, 16), np.zeros(4, np.int32)
    want = draft(*args, cache, start=start, rows=rows)
    got = draft(*args, cache=cache, start=start, rows=rows)
    assert_equal(got, want)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_null_slot_of_a_layer(columns):
    """As all groups count it: the second's slot of that number is a live one."""
    layer, params = layers.make()
    shared = ShardedLayer(layer, mesh_of(2, 2))
    own = {"params": shared.shard(params["params"])}
    slots = np.array([1, 0, 5, 4], np.int32)
    more = {}
    if columns == 2:  # of drafts, with slots of the convolution beside them
        slots = np.array([[2, 3], [0, 1], [9, 8], [12, 13]], np.int32)
        more = dict(num_accepted=np.array([1, 1, 2, 1], np.int32))
    x, found = layers.tokens(4, columns), []
    for each, variables in ((shared, own), (layer, params)):
        state = each.init_state(8 * columns, columns=columns)
        apply = jax.jit(functools.partial(each.apply, null_slot=0))
        found.append(apply(variables, x, state, slots=slots, **more))
    (y, state), (want, want_state) = found
    live = np.array([0, 2, 3])
    assert testing.relative_error(y[live], want[live]) < TOLERANCE
    assert testing.relative_error(state.recurrent, want_state.recurrent) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("Qwen3.5", (2, 4)), ("Qwen3-Next", (1, 4)), ("OLMo-hybrid", (1, 2))],
)
def test_layers(kind, mesh):
    """Of four devices two share a key head."""
    layer, params = layers.make(kind)
    shared = ShardedLayer(layer, mesh_of(*mesh))
    own = {"params": shared.shard(params["params"])}
    slots = np.array([1, 0, 5, 7], np.int32)
    x, found = layers.tokens(4, 3), []
    for each, variables in ((shared, own), (layer, params)):
        state = each.init_state(8)
        first, state = jax.jit(each.apply)(variables, x, state, slots=slots)
        apply = jax.jit(each.apply)
        text = apply.lower(variables, x[:, :1], state, slots=slots).compile().as_text()
        last, _ = apply(variables, x[:, :1], state, slots=slots)
        found.append((first, last, testing.collectives(text)))
    assert testing.relative_error(found[0][0], found[1][0]) < TOLERANCE
    assert testing.relative_error(found[0][1], found[1][1]) < TOLERANCE
    assert [each[2] for each in found] == [{"all-reduce": 1}, {}]
    y, _ = jax.jit(shared.apply)(own, x)
    assert testing.relative_error(y, layers.apply(layer, params, x)[0]) < TOLERANCE


@pytest.mark.once
@pytest.mark.parametrize("name", ["next with experts", "3.5"])
def test_loading(saved, name):
    folder, model, params = saved(name)
    mesh = mesh_of(2, 2)
    shared, found = models.load_sharded(folder, mesh)
    assert_same(found, ShardedModel(model, mesh).shard(params))
    for path, array in parameters._flat(found).items():
        target = shared.targets[path]
        assert array.shape == target.shape and array.dtype == target.dtype
        own = {x.data.size for x in array.addressable_shards}
        is_split = array.sharding.spec != jax.sharding.PartitionSpec()
        assert own == {array.size // (2 if is_split else 1)}
    split = found["layers_0"]["mixer"]["in_proj"]
    for each in split.values():
        assert each["kernel"].sharding.spec[1] in ("model", ("model",))


@pytest.mark.once
def test_only_own_parts_are_read(saved):
    """In one piece for each run of columns: no device's part is of all the rest."""
    _, model, params = saved("3.5")
    shared = ShardedModel(model, mesh_of(1, 4))
    path = "layers_0/mixer/in_proj/qkv/kernel"
    target, array = parameters.find_targets(model)[path], params["layers_0"]["mixer"]
    array, sizes = np.asarray(array["in_proj"]["qkv"]["kernel"]), []

    def read(index):
        sizes.append(array[index].shape)
        return array[index]

    got = shared.place(path, target, read)
    # Two key heads of four for four devices, which two of them share; four value heads.
    assert sizes == [(16, 4)] * 12 and got.shape == (16, 48)
    np.testing.assert_array_equal(got[:, 12:16], array[:, 0:4])


@pytest.mark.once
def test_fields_of_layers_that_are_not_there_are_left_alone():
    """Three heads of keys and values could not be shared out."""
    fields = dict(num_attention_heads=6, num_key_value_heads=3, num_mtp_layers=0)
    layers = dict(layer_types=("linear_attention",))
    config = dataclasses.replace(engines.make()[0].config, **fields, **layers)
    own = ShardedModel(models.Model(config), mesh_of(1, 2)).part.own_config
    assert (own.num_attention_heads, own.num_key_value_heads) == (6, 3)
    assert (own.linear_num_value_heads, own.linear_num_key_heads) == (2, 1)


@pytest.mark.once
def test_errors():
    whole, params = engines.make()
    says = functools.partial(pytest.raises, ValueError)
    mesh = functools.partial(mesh_of, 1)
    with says(match="num_attention_heads must be a multiple of the 3.*1, 2, 4"):
        ShardedModel(whole, mesh(3))
    with says(match="linear_num_key_heads must .*they divide 6.*got 2.*: 1, 2.$"):
        fields = dict(linear_num_value_heads=6, layer_types=("linear_attention",))
        config = dataclasses.replace(whole.config, num_mtp_layers=0, **fields)
        ShardedModel(models.Model(config), mesh(3))
    with says(match="axes must be one mesh axis for all of these"):
        ShardedModel(whole, mesh(2), dict(sharding.AXES, mlp=None))
    shared = ShardedModel(whole, mesh_of(2, 2))
    with says(match="must lie on the mesh as.*got .*SingleDevice.*load_sharded"):
        Engine(shared, params, **engines.SIZES)
    params = shared.shard(params)
    with says(match="num_rows must be a multiple of the 2.*got 3.*next multiple is 4."):
        Engine(shared, params, **engines.SIZES | dict(num_rows=3))
    with says(match="method must be one of __call__, hidden"):
        shared.apply({"params": params}, tokens(), method="setup")
    with says(match="argument 0's axis 0 must be a multiple of the 2"):
        shared.apply({"params": params}, tokens()[:3])


def test_a_whole_models_parameters_are_refused():
    whole, params = engines.make()
    shared = ShardedModel(whole, mesh_of(1, 2))
    wrong = pytest.raises(ValueError, match=r"must lie on the mesh as.*model\.shard")
    with wrong:
        shared.apply({"params": params}, tokens())
    with wrong:
        jax.jit(lambda x: shared.apply({"params": params}, x))(tokens())
    four = ShardedModel(whole, mesh_of(1, 4))  # whose heads are more, with copies
    with pytest.raises(ValueError, match=r"params are not this model's.*wanted"):
        jax.jit(four.apply)({"params": params}, tokens())
    with pytest.raises(ValueError, match="params must be a tree of parameters"):
        shared.apply({}, tokens())


@pytest.mark.parametrize(
    ("model", "text"), [(2, "must lie on the mesh as"), (4, r"must be .* on the mesh")]
)
def test_a_whole_layers_parameters_are_refused(model, text):
    layer, params = layers.make()
    shared = ShardedLayer(layer, mesh_of(1, model))
    with pytest.raises(ValueError, match=f"{text}.*Give what shard"):
        shared.apply(params, layers.tokens(2, 3))
    if model == 4:  # of other shapes, which are known under `jit` too
        with pytest.raises(ValueError, match=text):
            jax.jit(shared.apply)(params, layers.tokens(2, 3))
    numpy = jax.tree.map(np.asarray, shared.shard(params["params"]))
    with pytest.raises(ValueError, match=r"got .*ndarray"):
        shared.apply({"params": numpy}, layers.tokens(2, 3))
