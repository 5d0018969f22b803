"""Gradients of the updates: each path brings a forward and a backward of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from gdn_jax.ops.gated_delta.call import Inputs, Options
from gdn_jax.ops.gated_delta.reference import reference

Results = tuple[Array, Array]
Forward = Callable[[Inputs, Options, Any], Results]


def reference_backward(
    x: Inputs, options: Options, config: Any, cotangents: Results
) -> Inputs:
    """The recurrence, backward token by token."""
    del config
    return pull_back(reference, x, options, cotangents)


class Path(NamedTuple):
    """One implementation: (state, out) of inputs, and the inputs' cotangents."""

    forward: Forward
    backward: Callable[[Inputs, Options, Any, Results], Inputs] = reference_backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(path: Path, options: Options, config: Any, x: Inputs) -> Results:
    return path.forward(x, options, config)


def _forward(path: Path, options: Options, config: Any, x: Inputs):
    """Keeps the inputs alone. What the backward pass needs besides (states on the way,
    a chunk's triangle) is as large as several inputs, and is computed again."""
    return differentiable(path, options, config, x), x  # so that it has a gradient too


def _backward(path: Path, options: Options, config: Any, x: Inputs, cotangents):
    return (path.backward(x, options, config, cotangents),)


differentiable.defvjp(_forward, _backward)


def pull_back(
    update: Callable[[Inputs, Options], Results],
    x: Inputs,
    options: Options,
    cotangents: Results,
) -> Inputs:
    """The cotangents of an update that JAX differentiates."""
    floats = (x.state, x.q, x.k, x.v, x.gates)

    def of_floats(*floats):
        return update(Inputs(*floats, *x[len(floats) :]), options)

    return Inputs(*jax.vjp(of_floats, *floats)[1](cotangents))
