"""An engine's functions on a mesh: each device runs them on its part of everything."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gdn_jax.generation.sizes import Sizes
from gdn_jax.models.sharded import AnyModel, ShardedModel


def on_every_device(step: Callable[..., Any]) -> Callable[..., Any]:
    """Of `step(model, params, state, ..) -> (state, emitted)` what does so with a model
    that devices share out too.

    All of a block of steps is inside of one `shard_map`, so that XLA has nothing to
    decide: what is sent is what the model sends, and of tokens what the host reads.
    Groups of devices have rows of their own, and do not wait for each other's.
    """

    @functools.wraps(step)
    def run(
        model: AnyModel, params: Any, state: Any, *args: Any, **options: Any
    ) -> tuple[Any, Any]:
        if not isinstance(model, ShardedModel):
            return step(model, params, state, *args, **options)
        arrays = [x for x in args if isinstance(x, tuple)]  # prompts, if any
        static = args[len(arrays) :]

        def local(params: Any, state: Any, arrays: Any) -> tuple[Any, Any]:
            own = [
                prompts._replace(rows=model.own_rows(prompts.rows, state.model))
                for prompts in arrays
            ]
            state, emitted = step(model.part, params, state, *own, *static, **options)
            return state, emitted._replace(steps=emitted.steps[None])

        specs = model.specs(state)
        inputs = dict(params=model.param_specs), specs, model.specs(arrays)
        rows = model.specs(jax.ShapeDtypeStruct((1,), jnp.int32))
        run = model.grid.run(local, inputs, (specs, rows))
        state, emitted = run(params, state, arrays)
        emitted = emitted._replace(steps=jnp.max(emitted.steps))
        whole = NamedSharding(model.mesh, PartitionSpec())  # every process reads all
        return state, jax.lax.with_sharding_constraint(emitted, whole)

    return run


class Jitted:
    """`jax.jit(step)` of `step(model, ..)`, compiled with what the model tells XLA; one
    program for all engines of a model and sizes."""

    def __init__(self, step: Callable[..., Any], **keywords: Any):
        self._compiled = functools.cache(
            lambda options: jax.jit(step, compiler_options=dict(options), **keywords)
        )
        functools.update_wrapper(self, step)

    def __call__(self, model: AnyModel, *args: Any, **keywords: Any) -> Any:
        return self.of(model)(model, *args, **keywords)

    def of(self, model: AnyModel) -> Any:
        """What `jax.jit` made for such a model."""
        is_shared = isinstance(model, ShardedModel)
        return self._compiled(model.decoding_options if is_shared else ())


def own_part(model: AnyModel, sizes: Sizes) -> tuple[Any, Sizes]:
    """What a device has of a model and of an engine's rows."""
    if not isinstance(model, ShardedModel):
        return model, sizes
    rows = sizes.num_rows // model.groups
    return model.part, dataclasses.replace(sizes, num_rows=rows)
