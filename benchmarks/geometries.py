"""What whole models decode: geometries, random weights and states, and what a step must
move at the least."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import meta

from gdn_jax import models
from gdn_jax.generation.sizes import Sizes
from gdn_jax.generation.state import EngineState, init_state
from gdn_jax.nn.state import GatedDeltaNetState

CONTEXT, ROOM = 1024, 2048  # tokens that each row has read, positions it has room for
STEPS = 16  # of a block


def geometry(hidden: int, layers: int, heads: int, kv_heads: int, **others: Any):
    kinds = ("linear_attention",) * 3 + ("full_attention",)
    return models.Config(
        hidden_size=hidden,
        layer_types=kinds * (layers // 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=1e7,
        num_mtp_layers=1,
        **others,
    )


dense = functools.partial(geometry, model_type="qwen3_5_text", vocab_size=248320)
MODELS = {
    "Qwen3.5-4B": dense(
        2560, 32, 16, 4, intermediate_size=9216, tie_word_embeddings=True
    ),
    "Qwen3.5-9B": dense(4096, 32, 16, 4, intermediate_size=12288),
    "Qwen3.5-27B": dense(
        5120, 64, 24, 4, intermediate_size=17408, linear_num_value_heads=48
    ),
    "Qwen3-Next-80B-A3B, 36 of 48 layers": geometry(
        2048,
        36,
        16,
        2,
        model_type="qwen3_next",
        vocab_size=151936,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
}

# Of which no GPU has room for half the layers; without its prediction head.
LARGE = {
    "Qwen3.5-397B-A17B": dataclasses.replace(
        geometry(
            4096,
            60,
            32,
            2,
            model_type="qwen3_5_moe_text",
            vocab_size=248320,
            linear_num_value_heads=64,
            num_experts=512,
            num_experts_per_tok=10,
            moe_intermediate_size=1024,
            shared_expert_intermediate_size=1024,
        ),
        num_mtp_layers=0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Point:
    model: str
    rows: int
    drafts: int
    state_dtype: str
    decode: str | None = None

    @property
    def config(self) -> models.Config:
        return MODELS[self.model]

    @property
    def sizes(self) -> Sizes:
        sizes = self.rows, ROOM, self.drafts, STEPS, ROOM, 1, self.state_dtype
        return Sizes(*sizes, self.decode)

    @property
    def tokens_a_step(self) -> float:
        return 1 + self.drafts / 2

    @property
    def num_linear(self) -> int:
        return self.config.layer_types.count("linear_attention")


def make_model(config: models.Config) -> models.Model:
    return models.Model(
        config,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        implementation="triton",  # not XLA's in its place, whatever the machine
    )


@functools.cache
def param_shapes(config: models.Config) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(make_model(config).init, jax.random.key(0), tokens)
    return meta.unbox(shapes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def random_of(shapes: Any, seed: int) -> Any:
    """Normal numbers in floating leaves, an array at a time; zeros in the others."""
    key = jax.random.key(seed, impl="unsafe_rbg")
    leaves, structure = jax.tree.flatten(shapes)
    made = [
        _normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, made)


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_shapes(point: Point) -> EngineState:
    return jax.eval_shape(lambda: init_state(make_model(point.config), point.sizes))


def make_state(point: Point) -> EngineState:
    """Every row has read CONTEXT tokens and goes on for ever."""
    # made without a second copy, which there may be no room for
    small = dataclasses.replace(point, rows=1)
    one = init_state(make_model(point.config), small.sizes).rows
    shapes = state_shapes(point)
    state = random_of(shapes._replace(rows=None), 1)
    state = state._replace(model=at_their_own_places(state.model))
    rows = jax.tree.map(lambda x: jnp.repeat(x, point.rows, axis=0), one)
    state = state._replace(
        token=jnp.arange(point.rows, dtype=jnp.int32),
        is_active=jnp.ones_like(state.is_active),
        rows=rows._replace(limit=jnp.full_like(rows.limit, 2**30)),
        num_accepted=1 + jnp.arange(point.rows, dtype=jnp.int32) % (1 + point.drafts),
    )
    return rewind(state)


def at_their_own_places(state: Any) -> Any:
    """A model's state with as many records in each row's ring as may be, but for the
    step's own: from none to a full ring, in turn."""

    def spread(layer: Any) -> Any:
        if not isinstance(layer, GatedDeltaNetState) or not layer.is_replay:
            return layer
        records = layer.recurrent
        committed = jnp.arange(len(records.committed)) % records.window
        decay = -jnp.abs(records.log_decay)
        records = records._replace(committed=committed, log_decay=decay)
        return layer._replace(recurrent=records)

    return state._replace(layers=tuple(map(spread, state.layers)))


def rewind(state: EngineState) -> EngineState:
    """To where every row has CONTEXT tokens, so that each block reads as many."""
    length = jnp.full_like(state.position, CONTEXT)
    return state._replace(
        model=state.model._replace(length=length), position=length + 1
    )


def least_bytes(point: Point) -> dict[str, float]:
    """Of a step, by what they are: each weight that is used once a pass, keys and
    values of the tokens read, states in and out. Experts: those that tokens which
    choose evenly choose, on average."""
    config, N, T = point.config, point.rows, 1 + point.drafts
    params = param_shapes(config)["params"]
    state = state_shapes(point)

    def used(tree: Any, tokens: int) -> float:
        """Bytes of a part of the model that reads so many tokens."""
        total = 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            share = 1.0
            if "experts" in jax.tree_util.keystr(path):
                unused = 1 - config.num_experts_per_tok / config.num_experts
                share = 1 - unused**tokens
            total += share * leaf.size * leaf.dtype.itemsize
        return total

    head = num_bytes(params["embed" if config.tie_word_embeddings else "head"])
    weights = used({k: v for k, v in params.items() if k.startswith("layers")}, N * T)
    weights += head
    kv = recurrent = 0.0
    for kind, layer in zip(config.layer_types, state.model.layers, strict=True):
        if kind == "full_attention":
            kv += num_bytes(layer) * CONTEXT / ROOM
        else:
            # of T states one is read and T are written; so are the inputs of filters
            recurrent += num_bytes(layer.recurrent) * (1 + T) / T
            recurrent += 2 * num_bytes(layer.conv.buffer)
    if state.drafts is not None:
        weights += used(params["mtp"], N * T) + head
        weights += (point.drafts - 1) * (used(params["mtp"], N) + head)
        kv += point.drafts * num_bytes(state.drafts.cache) * CONTEXT / ROOM
    return {"weights": weights, "kv": kv, "state": recurrent}


def memory(point: Point) -> tuple[int, int]:
    """Bytes that weights and state take, and that the device has."""
    needed = num_bytes(param_shapes(point.config)) + num_bytes(state_shapes(point))
    return needed, jax.devices()[0].memory_stats()["bytes_limit"]
