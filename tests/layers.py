"""Small layers of every model's kind, and inputs, for the tests of the layer."""

import functools

import flax.linen
import jax
import jax.numpy as jnp

from gdn_jax import nn, testing

MODELS = {
    "Qwen3-Next": dict(layout="interleaved"),
    "Qwen3.5": dict(),
    "OLMo-hybrid": dict(layout="separate", allow_neg_eigval=True, norm_eps=1e-5),
    "Kimi-Linear": dict(
        layout="separate",
        per_key_decay=True,
        gate_rank=5,
        norm_eps=1e-5,
        output_activation="sigmoid",
    ),
}
D = 12
# Relative RMS of one call against several, by the rule's path: float32, products of
# other shapes; the norm makes more of the rule's own error in tokens of small `out`.
TOLERANCE = {"fused": 5e-6, "chunk": 2e-5}


@functools.cache
def make(model="Qwen3.5", **fields):
    """A layer and its parameters, unboxed; large ones, so that gates vary."""
    fields = (
        MODELS[model] | dict(kernel_init=flax.linen.initializers.normal(0.4)) | fields
    )
    layer = nn.GatedDeltaNet(D, 2, 4, 8, 6, **fields)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    return layer, flax.linen.unbox(params)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("path", "implementation", "null_slot")
)
def apply(layer, params, x, state=None, **keywords):
    """One program for a call's form: outside `jit` every operation is one to compile.
    test_layer_module.py and test_layer_parity.py call layers outside as well."""
    return layer.apply(params, x, state, **keywords)


def tokens(*lead, seed=1):
    return jax.random.normal(jax.random.key(seed), (*lead, D))


def agree(got, want, rule="fused") -> bool:
    return testing.relative_error(got, want) < TOLERANCE[rule]


def recurrent_and_history(layer, state, slots=slice(None)):
    """What of a state the next call can see, in the slots given."""
    return state.recurrent[slots], state.conv.to_dense(layer.conv_width)[slots]


def poisoned(state, slots):
    """NaN in slots that nothing may read."""
    buffer = state.conv.buffer.at[slots].set(jnp.nan)
    recurrent = state.recurrent.at[slots].set(jnp.nan)
    return state._replace(conv=state.conv._replace(buffer=buffer), recurrent=recurrent)
