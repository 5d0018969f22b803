"""Gradients of the update: any implementation forward, the oracle backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from gdn_jax.ops.gated_delta.call import Inputs, Options
from gdn_jax.ops.gated_delta.reference import reference

Path = Callable[[Inputs, Options, Any], tuple[Array, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(path: Path, options: Options, config: Any, x: Inputs):
    return path(x, options, config)


def _forward(path: Path, options: Options, config: Any, x: Inputs):
    """Keeps the inputs alone: the backward pass runs the recurrence again."""
    return differentiable(path, options, config, x), x  # so that it has a gradient too


def _backward(path: Path, options: Options, config: Any, x: Inputs, cotangents):
    del path, config
    floats = (x.state, x.q, x.k, x.v, x.gates)

    def update(*floats):
        return reference(Inputs(*floats, *x[len(floats) :]), options)

    _, pullback = jax.vjp(update, *floats)
    return (Inputs(*pullback(cotangents)),)


differentiable.defvjp(_forward, _backward)
