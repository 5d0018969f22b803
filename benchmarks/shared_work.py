"""What sharded.py measures: a block of decoding steps, and an all-reduce alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from geometries import CONTEXT, MODELS, STEPS, make_model
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gdn_jax import sharding, testing
from gdn_jax.generation import state as states
from gdn_jax.generation import steps
from gdn_jax.generation.sizes import Sizes
from gdn_jax.models import ShardedModel
from gdn_jax.sharding.compiling import options_of

ROOM = 1280  # positions of a row, CONTEXT of them read: 1024 rows fit one GPU


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A block of steps of a model's engine.

    Attributes:
      case: "tensor", the model's heads over the GPUs, or "data", the sequences.
      rows: sequences, of all GPUs.
    """

    case: str
    model: str
    rows: int
    gpus: int

    @property
    def steps(self) -> int:
        return STEPS

    @property
    def title(self) -> str:
        return f"{self.case}: {self.model} N={self.rows} on {self.gpus}"

    @functools.cached_property
    def shared(self) -> ShardedModel:
        config = dataclasses.replace(MODELS[self.model], num_mtp_layers=0)
        parts = {"model" if self.case == "tensor" else "data": self.gpus}
        mesh = sharding.make_mesh(**parts)
        return ShardedModel(make_model(config), mesh)

    @property
    def compiler_options(self) -> dict[str, Any]:
        return dict(self.shared.decoding_options)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.rows, ROOM, 0, STEPS, ROOM, 1, "float32")

    def on_mesh(self, specs: Any) -> Any:
        mesh = self.shared.mesh
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    @functools.cached_property
    def params(self) -> Any:
        """Shapes of the parameters, and where they lie."""
        flat = {
            path: jax.ShapeDtypeStruct(target.shape, target.dtype)
            for path, target in self.shared.targets.items()
        }
        shardings = self.on_mesh(self.shared.param_specs)
        return {"params": _placed(unflatten_dict(flat, "/"), shardings)}

    @functools.cached_property
    def state(self) -> Any:
        shapes = jax.eval_shape(lambda: states.init_state(self.shared, self.sizes))
        return _placed(shapes, self.on_mesh(self.shared.specs(shapes)))

    def lower(self) -> Any:
        where = jax.tree.map(lambda x: x.sharding, self.state)
        whole = NamedSharding(self.shared.mesh, PartitionSpec())
        jitted = jax.jit(
            _block, static_argnums=0, donate_argnums=2, out_shardings=(where, whole)
        )
        return jitted.lower(self.shared, self.params, self.state)

    def compile_inputs(self) -> None:
        for x in jax.tree.leaves((self.params, self.state.model)):
            _maker(self.shared, x.sharding, x.shape, x.dtype)

    def prepare(self, program: Any) -> Callable[[], None]:
        params = _random(self.shared, self.params, 0)
        held = {"state": self._fill()}

        def run() -> None:
            held["state"], emitted = program(params, held["state"])
            jax.block_until_ready(emitted)

        jax.block_until_ready((params, held))
        return run

    def _fill(self) -> Any:
        """Every row goes on for ever; see `geometries.make_state`."""
        part, own = states.own_part(self.shared, self.sizes)

        def begin(rows: int) -> Any:
            rest = states._init_state(part, own)._replace(model=None)
            limit = jnp.full_like(rest.rows.limit, 2**30)
            return rest._replace(
                token=jnp.arange(rows, dtype=jnp.int32),
                is_active=jnp.ones_like(rest.is_active),
                rows=rest.rows._replace(limit=limit),
            )

        rest = self.shared.make(begin, self.rows)
        return rest._replace(model=_random(self.shared, self.state.model, 1))

    def figures(self, ms: float) -> dict[str, Any]:
        return {"tokens_per_s": 1e3 * self.rows / ms}

    def collectives(self, text: str) -> dict[str, int]:
        return testing.collectives(text)


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """One after another, with a product between, which takes a launch too."""

    bytes: int
    gpus: int
    case: str = "all_reduce"

    @property
    def steps(self) -> int:
        return 64

    @property
    def title(self) -> str:
        return f"all-reduce of {self.bytes:,} bytes on {self.gpus}"

    @functools.cached_property
    def x(self) -> Any:
        mesh = sharding.make_mesh(model=self.gpus)
        shape = (self.gpus * self.bytes // 2,)
        where = NamedSharding(mesh, PartitionSpec("model"))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

    @property
    def compiler_options(self) -> dict[str, Any]:
        return dict(options_of(self.x.sharding.mesh))

    def lower(self) -> Any:
        def chain(x: jax.Array) -> jax.Array:
            for _ in range(self.steps):
                x = lax.psum(x, "model") * jnp.bfloat16(1 / self.gpus)
            return x

        spec = PartitionSpec("model")
        run = jax.shard_map(
            chain,
            mesh=self.x.sharding.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        return jax.jit(run).lower(self.x)

    def compile_inputs(self) -> None:
        pass

    def prepare(self, program: Any) -> Callable[[], None]:
        make = jax.jit(jnp.ones, static_argnums=(0, 1), out_shardings=self.x.sharding)
        x = make(self.x.shape, self.x.dtype)
        return lambda: jax.block_until_ready(program(x))

    def figures(self, ms: float) -> dict[str, Any]:
        return {"us_each": 1e3 * ms}

    def collectives(self, text: str) -> dict[str, int]:
        return testing.collectives(text)


Work = Decoding | AllReduce


def _block(model: ShardedModel, params: Any, state: Any) -> Any:
    """From where every row has CONTEXT tokens, so that each block reads as many."""
    length = jnp.full_like(state.position, CONTEXT)
    state = state._replace(
        model=state.model._replace(length=length), position=length + 1
    )
    return steps.decode.__wrapped__(model, params, state, STEPS, True)


def _placed(shapes: Any, shardings: Any) -> Any:
    def placed(x: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(placed, shapes, shardings)


def _random(model: ShardedModel, shapes: Any, seed: int) -> Any:
    """Normal numbers in floating leaves, zeros in others; each device makes its own."""
    key = jax.device_put(
        jax.random.key(seed, impl="unsafe_rbg"),
        NamedSharding(model.mesh, PartitionSpec()),
    )
    leaves, structure = jax.tree.flatten(shapes)
    made = [
        _maker(model, x.sharding, x.shape, x.dtype)(jax.random.fold_in(key, i))
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, made)


@functools.cache
def _maker(
    model: ShardedModel, where: NamedSharding, shape: tuple[int, ...], dtype: Any
) -> Any:
    own, spec = where.shard_shape(shape), where.spec
    over = tuple(axis for part in spec for axis in sharding.grid.names_of(part))

    def make(key: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(own, dtype)
        if over:  # what is whole is alike everywhere
            key = jax.random.fold_in(key, lax.axis_index(over))
        return 0.02 * jax.random.normal(key, own, dtype)

    key = jax.random.key(0, impl="unsafe_rbg")
    whole = NamedSharding(model.mesh, PartitionSpec())
    run = model.grid.run(make, (PartitionSpec(),), spec)
    return jax.jit(run, in_shardings=whole).lower(key).compile()
