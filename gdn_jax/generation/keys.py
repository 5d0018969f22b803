"""Keys of what a request draws, and uniform numbers of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32, Key

from gdn_jax.ops import checks


class Keys(NamedTuple):
    """Keys of the token at a position, one for each thing that is drawn there."""

    draft: Key[Array, "P ..."]
    accept: Key[Array, "P ..."]
    next: Key[Array, "P ..."]


def position_keys(seeds: Key[Array, " P"], positions: Int32[Array, "P ..."]) -> Keys:
    """The keys of the tokens at some positions of each request.

        key[stream] = fold_in(fold_in(seed, position), stream)

    They depend on nothing else: not on the batch around a request, its row there, or
    how many tokens a step takes. Plain sampling, with `next`, thus draws the same
    tokens in any batch. Speculative sampling draws others, of the same distribution,
    that depend on where its drafts were, and on no other row.

    Args:
      seeds: one key a request, of an implementation that draws the same under `vmap`
        as alone, as threefry2x32 does and rbg does not.
      positions: [P, ...], of the token that is drawn, counted from the request's start.

    Returns:
      Keys of positions' shape.

    Raises:
      ValueError: seeds are no such keys, or positions are not int32 [P, ...].
    """
    seeds = check_keys("seeds", seeds)
    positions = checks.integers("positions", positions)
    if "rbg" in str(jax.random.key_impl(seeds)):
        remedy = "Make them with jax.random.key(seed, impl='threefry2x32')."
        checks.fail("seeds", jax.random.key_impl(seeds), "keys of threefry2x32", remedy)
    if seeds.ndim != 1 or positions.shape[:1] != seeds.shape:
        got = f"{positions.shape} with seeds {seeds.shape}"
        checks.fail("positions", got, "[P, ...] with seeds [P]", "One seed a row.")

    def at(seed: Array, position: Array) -> Keys:
        key = jax.random.fold_in(seed, position)
        return Keys(*(jax.random.fold_in(key, stream) for stream in range(3)))

    for _ in positions.shape[1:]:
        at = jax.vmap(at, (None, 0))
    return jax.vmap(at)(seeds, positions)


def uniform(keys: Array, count: int) -> Array:
    """[*keys, count] in [0, 1)."""

    def draw(key):
        return jax.random.uniform(key, (count,), jnp.float32)

    for _ in keys.shape:
        draw = jax.vmap(draw)
    return draw(keys)


def check_keys(name: str, keys: Any) -> Array:
    dtype = getattr(keys, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = type(keys).__name__ if dtype is None else dtype
        checks.fail(name, got, "typed keys", "See jax.random.key, position_keys.")
    return keys
