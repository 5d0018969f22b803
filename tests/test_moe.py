"""The mixture of experts against all experts for all tokens; padding; wrong calls."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from gdn_jax import nn, testing

D, E, K, F, SHARED = 24, 6, 2, 10, 12
TOLERANCE = 2e-6  # four products of float32, one after another

pytestmark = pytest.mark.usefixtures("exact_products")


def _layer(**changed):
    sizes = dict(
        hidden_size=D,
        num_experts=E,
        experts_per_token=K,
        expert_size=F,
        shared_size=SHARED,
    )
    init = flax.linen.initializers.normal(0.3)
    return nn.MixtureOfExperts(**(sizes | dict(kernel_init=init) | changed))


def _tokens(*lead, seed=0, dtype=np.float32):
    x = np.random.default_rng(seed).standard_normal((*lead, D))
    return jnp.asarray(x, dtype)


@functools.cache
def _params():
    return flax.linen.unbox(jax.jit(_layer().init)(jax.random.key(0), _tokens(1)))


def _apply(layer, *given):
    return jax.jit(layer.apply)(_params(), *given)


def _silu(x):
    return x / (1 + np.exp(-x))


def _dense(params, x, norm_topk):
    """Every token through every expert; float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    x = np.asarray(x, np.float64)
    scores = np.exp(x @ p["router"]["kernel"])
    scores /= scores.sum(-1, keepdims=True)
    chosen = scores >= np.sort(scores, axis=-1)[..., -K, None]
    weights = np.where(chosen, scores, 0)
    weights /= weights.sum(-1, keepdims=True) if norm_topk else 1
    gate, up = np.split(np.einsum("...d,edf->...ef", x, p["experts_gate_up"]), 2, -1)
    each = np.einsum("...ef,efd->...ed", _silu(gate) * up, p["experts_down"])
    shared = {name: matrix["kernel"] for name, matrix in p["shared"].items()}
    hidden = _silu(x @ shared["gate"]) * (x @ shared["up"])
    opened = 1 / (1 + np.exp(-x @ p["shared_gate"]["kernel"]))
    mixed = np.einsum("...e,...ed->...d", weights, each)
    return mixed + opened * (hidden @ shared["down"])


@pytest.mark.parametrize("norm_topk", [True, False])
def test_agrees_with_all_experts_for_all_tokens(path, norm_topk):
    layer = _layer(norm_topk=norm_topk, implementation=path)
    x = _tokens(3, 7)
    y = _apply(layer, x)
    assert y.shape == x.shape
    want = _dense(_params(), x, norm_topk)
    assert testing.relative_error(y, want) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computes_in_its_own_dtype(dtype):
    layer = _layer(dtype=jnp.dtype(dtype))
    x = _tokens(5, seed=3)
    y = _apply(layer, x)
    assert y.dtype == dtype
    want = _dense(_params(), x, True)
    assert testing.relative_error(y, want) < 8 * testing.TOLERANCE["out", dtype]


def test_the_gradient_is_that_of_all_experts():
    layer = _layer()
    x = _tokens(9)

    def loss(params, x, multiply):
        return jnp.sum(jnp.sin(multiply(params, x)))

    def dense(params, x):
        p = params["params"]
        scores = jax.nn.softmax(x @ p["router"]["kernel"])
        least = jnp.sort(scores)[:, -K, None]
        weights = jnp.where(scores >= least, scores, 0)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        both = jnp.einsum("ld,edf->lef", x, p["experts_gate_up"])
        gate, up = jnp.split(both, 2, -1)
        hidden = jax.nn.silu(gate) * up
        each = jnp.einsum("lef,efd->led", hidden, p["experts_down"])
        shared = nn.GatedMLP(D, SHARED).apply({"params": p["shared"]}, x)
        opened = jax.nn.sigmoid(x @ p["shared_gate"]["kernel"])
        return jnp.einsum("le,led->ld", weights, each) + opened * shared

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got, want = (gradient(_params(), x, f) for f in (layer.apply, dense))
    errors = jax.tree.map(testing.relative_error, got, want)
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_a_token_alone_is_as_among_others():
    layer = _layer()
    x = _tokens(11)
    apply = jax.jit(layer.apply)
    together = apply(_params(), x)
    alone = jnp.stack([apply(_params(), token) for token in x])
    assert testing.relative_error(together, alone) < TOLERANCE


def test_padding_takes_no_expert_and_its_nan_reaches_nothing(path):
    layer, x = _layer(implementation=path), _tokens(2, 5)
    live = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 1]], bool)

    def loss(params, x):
        y = layer.apply(params, x, live)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, y = run(_params(), jnp.where(live[..., None], x, jnp.nan))
    assert not np.asarray(y)[~live].any()
    assert not np.asarray(gradients[1])[~live].any()
    alone = _apply(_layer(), x[live])
    assert testing.relative_error(y[live], alone) < TOLERANCE
    want, _ = run(_params(), x)
    errors = jax.tree.map(testing.relative_error, gradients, want)
    # On a GPU gradients of a token's experts are added up in any order.
    assert max(jax.tree.leaves(errors)) < (1e-6 if path == "triton" else 1e-30)


def test_parameters_name_their_axes():
    layer = _layer(param_dtype=jnp.bfloat16)
    boxed = jax.jit(layer.init)(jax.random.key(0), _tokens(1))
    specs = flax.linen.get_partition_spec(boxed)["params"]
    assert tuple(specs["experts_gate_up"]) == ("experts", "embed", "mlp")
    assert tuple(specs["experts_down"]) == ("experts", "mlp", "embed")
    assert tuple(specs["router"]["kernel"]) == ("embed", "experts")
    assert tuple(specs["shared"]["down"]["kernel"]) == ("mlp", "embed")
    params = flax.linen.unbox(boxed)["params"]
    assert params["experts_gate_up"].shape == (E, D, 2 * F)
    assert params["experts_down"].shape == (E, F, D)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_as_an_nnx_module():
    layer, x = _layer(), _tokens(4)
    module = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0))
    with nnx.use_eager_sharding(False):
        nnx.bridge.lazy_init(module, x)
    assert module(x).shape == x.shape


@pytest.mark.parametrize(
    "field, value",
    [("num_experts", 0), ("shared_size", 0), ("experts_per_token", E + 1)],
)
def test_sizes_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        _layer(**{field: value})


@pytest.mark.parametrize(
    "x, live, message",
    [
        (jnp.ones((3, D + 1)), None, r"x must be \[..., 24\]; got \(3, 25\)"),
        (jnp.ones((3, D), jnp.int32), None, "x must be one of float32"),
        (jnp.ones((3, D)), jnp.ones(3), "live must be bool; got float32"),
        (jnp.ones((3, D)), jnp.ones(2, bool), r"live must be \(3,\); got \(2,\)"),
    ],
)
def test_a_wrong_call_says_what_to_do(x, live, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layer = _layer()
    with pytest.raises(ValueError, match=message):
        layer.apply(_params(), x, live)
