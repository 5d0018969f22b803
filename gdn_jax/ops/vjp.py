"""Gradients of an op: any implementation forward, the oracle backward."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Path: TypeAlias = Callable[[Any, Any, Any], Any]


def differentiable(oracle: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`run(path, options, config, x)` is `path(x, options, config)`, with the gradient
    of `oracle(x, options)`, which has the same results."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
    def run(path: Path, options: Any, config: Any, x: Any) -> Any:
        return path(x, options, config)

    def forward(path: Path, options: Any, config: Any, x: Any):
        """Keeps the inputs alone: the backward pass runs the oracle again."""
        return run(path, options, config, x), x  # so that it has a gradient too

    def backward(path: Path, options: Any, config: Any, x: Any, cotangents: Any):
        del path, config
        _, pullback = jax.vjp(lambda x: oracle(x, options), x)
        return pullback(cotangents)

    run.defvjp(forward, backward)
    return run
