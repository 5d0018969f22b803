"""Gradients of an op: every implementation brings a forward and a backward."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Path(NamedTuple):
    """forward(x, options, config) -> results; backward(x, options, config, cotangents)
    -> the cotangents of x."""

    forward: Callable[[Any, Any, Any], Any]
    backward: Callable[[Any, Any, Any, Any], Any]


def kernel_paths(kernel: Callable[..., Any], backward: Any) -> dict[bool, Path]:
    """A kernel's, by whether it is interpreted."""
    interpreted = functools.partial(kernel, interpret=True)
    return {False: Path(kernel, backward), True: Path(interpreted, backward)}


def backward_of(update: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The backward that JAX makes of `update(x, options)`, of the same results."""

    def backward(x: Any, options: Any, config: Any, cotangents: Any) -> Any:
        del config
        [pulled] = jax.vjp(lambda x: update(x, options), x)[1](cotangents)
        return pulled

    return backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(path: Path, options: Any, config: Any, x: Any) -> Any:
    return path.forward(x, options, config)


def _forward(path: Path, options: Any, config: Any, x: Any):
    """Keeps the inputs alone. What a backward pass needs besides (the states on the
    way, a chunk's triangle) is as large as several inputs, and is computed again."""
    return differentiable(path, options, config, x), x  # so that it has a gradient too


def _backward(path: Path, options: Any, config: Any, x: Any, cotangents: Any):
    return (path.backward(x, options, config, cotangents),)


differentiable.defvjp(_forward, _backward)

# jit so that a call outside jit is traced and compiled once, not at every call.
launched = jax.jit(differentiable, static_argnums=(0, 1, 2))
