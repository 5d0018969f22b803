"""How the gates' own parameters begin, as in Mamba 2 and the paper's code."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def decay_rate(low: float = 0.01, high: float = 16.0) -> Initializer:
    """A_log: the logarithm of a uniform decay rate. `low` > 0 keeps it finite."""

    def init(key, shape, dtype=jnp.float32):
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def time_step(low: float = 1e-3, high: float = 0.1) -> Initializer:
    """dt_bias: softplus(dt_bias) is a time step, uniform in its logarithm."""

    def init(key, shape, dtype=jnp.float32):
        bounds = jnp.log(low), jnp.log(high)
        step = jnp.exp(jax.random.uniform(key, shape, dtype, *bounds))
        return step + jnp.log(-jnp.expm1(-step))

    return init


def uniform_fan_in() -> Initializer:
    """A depthwise convolution's weights [C, W], as torch.nn.Conv1d begins them."""

    def init(key, shape, dtype=jnp.float32):
        bound = shape[-1] ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
