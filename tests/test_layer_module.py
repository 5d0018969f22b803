"""The layer as a Flax module: parameters, state, training, NNX, wrong calls."""

import functools
import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import jaxtyping
import layers
import numpy as np
import pytest
from flax import nnx
from layers import D, apply, tokens

import gdn_jax
from gdn_jax import nn, testing

CHANNELS = 2 * 2 * 8 + 4 * 6


def test_importing_the_library_imports_no_flax():
    code = "import sys, gdn_jax; sys.exit('flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model", layers.MODELS)
def test_parameters_name_their_axes(model):
    layer = nn.GatedDeltaNet(D, 2, 4, 8, 6, **layers.MODELS[model])
    boxed = layer.init(jax.random.key(0), tokens(1, 2))
    specs = flax.linen.get_partition_spec(boxed)["params"]
    shapes = jax.tree.map(jnp.shape, flax.linen.unbox(boxed))["params"]
    known = {"embed": D, "gdn_channels": CHANNELS}
    rules = [("embed", None), ("gdn_channels", None)]
    rules += [("gdn_key_heads", "mesh_axis"), ("gdn_value_heads", "mesh_axis")]
    for spec, shape in zip(
        jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        assert len(spec) == len(shape)
        for name, size in zip(spec, shape, strict=True):
            assert known.get(name, size) == size
            if name in ("gdn_key_heads", "gdn_value_heads"):
                assert size % (2 if name == "gdn_key_heads" else 4) == 0
    flax.linen.logical_to_mesh(specs, rules)


def test_parameters_begin_as_documented():
    layer = nn.GatedDeltaNet(D, 2, 512, 8, 6, param_dtype=jnp.bfloat16)
    params = flax.linen.unbox(layer.init(jax.random.key(0), tokens(1, 2)))["params"]
    rate = np.exp(np.asarray(params["A_log"]))
    step = np.asarray(jax.nn.softplus(params["dt_bias"]))
    assert 0.01 <= rate.min() < 1 and 15 < rate.max() <= 16
    assert 1e-3 * 0.99 < step.min() < 2e-3 and 0.05 < step.max() < 0.1 * 1.01
    exact = {"A_log", "dt_bias"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == (jnp.float32 if path[0].key in exact else jnp.bfloat16)


def test_an_empty_state():
    layer = nn.GatedDeltaNet(D, 2, 4, 8, 6, dtype=jnp.bfloat16)
    conv, recurrent = layer.init_state(5)
    assert conv.buffer.shape == (5, CHANNELS, 4) and conv.buffer.dtype == jnp.bfloat16
    assert recurrent.shape == (5, 4, 6, 8) and recurrent.dtype == jnp.float32
    conv, recurrent = layer.init_state(
        9, columns=3, num_conv_slots=2, recurrent_dtype=jnp.bfloat16
    )
    assert conv.buffer.shape == (2, CHANNELS, 6) and conv.start.shape == (2,)
    assert recurrent.shape == (9, 4, 6, 8) and recurrent.dtype == jnp.bfloat16


@pytest.mark.parametrize("model", layers.MODELS)
def test_every_parameter_has_a_finite_gradient(model):
    layer, params = layers.make(model)

    def loss(params, x):
        y, state = layer.apply(params, x)
        return jnp.sum(y**2) + jnp.sum(state.recurrent**2)

    gradients, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, tokens(2, 9))
    for gradient in [*jax.tree.leaves(gradients), of_x]:
        assert np.isfinite(gradient).all() and np.asarray(gradient).any()


@pytest.mark.parametrize(
    ("model", "implementation"),
    [("Qwen3.5", "xla"), ("Qwen3.5", "interpret"), ("Kimi-Linear", "xla")],
)
def test_gradients_in_chunks_equal_those_token_by_token(model, implementation):
    layer, params = layers.make(model)
    x, weights = tokens(2, 18), tokens(2, 18, seed=2)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradients(path, implementation, params, x):
        def loss(params, x):
            y, state = layer.apply(params, x, path=path, implementation=implementation)
            return jnp.sum(y * weights) + jnp.sum(state.recurrent**2)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    with jax.default_matmul_precision("highest"):  # a GPU's own is TF32
        got = gradients(None, implementation, params, x)
        want = gradients("fused", "reference", params, x)
    bar = testing.TOLERANCE["gradient", "float32"]
    for (place, g), w in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert testing.relative_error(g, w) < bar, place


@pytest.mark.parametrize("model", layers.MODELS)
def test_bfloat16_compute(model):
    layer, params = layers.make(model)
    half, _ = layers.make(model, dtype=jnp.bfloat16)
    x = tokens(2, 9)
    want, _ = apply(layer, params, x)
    y, state = apply(half, params, x.astype(jnp.bfloat16))
    assert y.dtype == state.conv.buffer.dtype == jnp.bfloat16
    assert state.recurrent.dtype == jnp.float32
    assert testing.relative_error(y, want) < 2e-2
    y, after = apply(half, params, x[:, :1].astype(jnp.bfloat16), state)
    assert [leaf.dtype for leaf in after[0]] == [leaf.dtype for leaf in state[0]]
    assert after.recurrent.dtype == jnp.float32


def test_nnx_takes_the_layer():
    layer, params = layers.make()
    x, more = tokens(2, 5), tokens(2, 1, seed=2)
    bridged = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0))
    with nnx.use_eager_sharding(False):  # for there is no mesh
        nnx.bridge.lazy_init(bridged, x)
    y, state = bridged(x)
    y, state = bridged(more, state, implementation="xla")
    same = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
    want, _ = layer.apply({"params": same}, jnp.concatenate([x, more], axis=1))
    assert layers.agree(y, want[:, 5:])

    gradients = nnx.grad(lambda bridged: jnp.sum(bridged(x)[0] ** 2))(bridged)
    assert len(jax.tree.leaves(gradients)) == len(jax.tree.leaves(params))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradients))


def test_nnx_lays_parameters_over_a_mesh():
    layer, _ = layers.make()
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = [("gdn_value_heads", "model"), ("embed", None), ("gdn_channels", None)]
    x = tokens(2, 5)
    with jax.set_mesh(mesh), flax.linen.logical_axis_rules(rules):
        bridged = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0))
        nnx.bridge.lazy_init(bridged, x)
        y, _ = bridged(x)
    assert bridged.A_log.get_value().sharding.spec == jax.P("model")
    assert np.isfinite(y).all()


def test_a_jitted_step_takes_its_state_over():
    layer, params = layers.make()
    step = jax.jit(layer.apply, donate_argnums=2)
    state = layer.init_state(2)
    _, after = step(params, tokens(2, 1), state)
    assert state.recurrent.is_deleted() and not after.recurrent.is_deleted()


def _arrays(keywords):
    """Lists as arrays, which is what the annotations that tests check ask for."""
    return {
        name: jnp.asarray(x) if isinstance(x, list) else x
        for name, x in keywords.items()
    }


@pytest.mark.parametrize(
    "lead, keywords, taken",
    [
        ((2, 16), {}, "fused"),
        ((2, 17), {}, "chunk"),
        ((2, 17), dict(path="fused"), "fused"),
        ((2, 1), dict(path="chunk"), "chunk"),
        ((40,), {}, "fused"),
        ((40,), dict(cu_seqlens=[0, 1, 2]), "chunk"),
        ((2,), dict(cu_seqlens=[0, 2], num_accepted=[1], slots=[[0, 1]]), "fused"),
    ],
)
def test_the_form_of_a_call_chooses_its_path(lead, keywords, taken, monkeypatch):
    layer, params = layers.make()
    called = []

    def spy(path):
        rule = getattr(gdn_jax, f"{path}_update")

        def run(*args, **options):
            called.append(path)
            return rule(*args, **options)

        monkeypatch.setattr(gdn_jax, f"{path}_update", run)

    spy("fused"), spy("chunk")
    state = layer.init_state(2, columns=2) if "slots" in keywords else None
    call = functools.partial(layer.apply, **_arrays(keywords))
    jax.eval_shape(call, params, tokens(*lead), state)
    assert called == [taken]


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_value_heads=3), "num_value_heads must be a multiple"),
        (dict(key_head_dim=0), "key_head_dim must be an int >= 1"),
        (dict(gate_rank=0), "gate_rank must be an int >= 1; got 0"),
        (dict(layout="mixed"), "layout must be one of interleaved, flat, separate"),
        (dict(output_activation="gelu"), "output_activation must be one of"),
        (dict(layout="interleaved", gate_rank=4), "`a` and `z` have no matrix"),
        (dict(layout="interleaved", per_key_decay=True), "'flat' or 'separate'"),
    ],
)
def test_wrong_fields(fields, words):
    sizes = dict(hidden_size=D, num_key_heads=2, num_value_heads=4)
    sizes |= dict(key_head_dim=8, value_head_dim=6)
    with pytest.raises(ValueError, match=words):
        nn.GatedDeltaNet(**sizes | fields)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(num_slots=0), "num_slots must be an int >= 1; got 0"),
        (dict(num_conv_slots=0), "num_conv_slots must be an int >= 1; got 0"),
        (dict(columns=0), "columns must be an int >= 1; got 0"),
        (dict(recurrent_dtype=jnp.int8), "recurrent_dtype must be one of .*int8"),
    ],
)
def test_wrong_sizes_of_a_state(sizes, words):
    layer, _ = layers.make()
    with pytest.raises(ValueError, match=words):
        layer.init_state(**dict(num_slots=2) | sizes)


@pytest.mark.parametrize(
    "lead, keywords",
    [((0, 3), {}), ((2, 0), {}), ((0,), {}), ((4,), dict(cu_seqlens=[0]))],
)
def test_an_empty_call(lead, keywords):
    """Without rows, or without tokens."""
    layer, params = layers.make()
    y, state = layer.apply(params, tokens(*lead), **_arrays(keywords))
    assert y.shape == (*lead, D) and not np.asarray(y).any()
    rows = 0 if keywords else lead[0]
    assert state.recurrent.shape[0] == state.conv.start.shape[0] == rows


@pytest.mark.parametrize(
    "keywords, words",
    [
        (dict(null_slot=0), "null_slot must be given with slots"),
        (dict(slots=[0, 1]), "state must be given where slots is"),
        (dict(num_accepted=[1, 1]), "state must be given where num_accepted is"),
        (dict(has_state=[True, True]), "state must be given where has_state is"),
        (dict(path="scan"), "path must be None or one of fused, chunk"),
        (dict(x=jnp.zeros((2, 3, D + 1))), "x must be .* hidden_size"),
        (dict(x=jnp.zeros((2, 3, D), jnp.int32)), "x must be of a floating.* int32"),
        (dict(cu_seqlens=[0, 2]), "cu_seqlens must be given with packed tokens"),
        (dict(pool=9, slots=[0]), r"slots must be \[N\] or \[N, S\] with N = 2"),
        (dict(pool=9, slots=[0, 1], conv_slots=[0]), "conv_slots must be"),
        (dict(pool=2, conv_slots=[0, 1]), "conv_slots must be given with slots"),
        (dict(pool=3), "state must be one slot per row"),
        (
            dict(pool=9, slots=[[0, 1, 2], [3, 4, 5]], num_accepted=[1, 1]),
            "state.conv must be of at least S columns",
        ),
        (
            dict(pool=9, slots=[[0], [1]], num_accepted=[1, 1], path="chunk"),
            "path must be 'fused' with num_accepted",
        ),
    ],
)
def test_wrong_calls(keywords, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    layer, params = layers.make()
    keywords = dict(x=tokens(2, 1)) | _arrays(keywords)
    if "pool" in keywords:
        keywords["state"] = layer.init_state(keywords.pop("pool"))
    with pytest.raises(ValueError, match=words):
        layer.apply(params, **keywords)
