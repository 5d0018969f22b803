"""Experts chosen and pairs sorted by two Pallas kernels (Triton lowering).

XLA takes a dozen launches for a few hundred numbers. Here the first has a program a
token, which chooses; the second counts, for each pair, the pairs that come before it.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices
from gdn_jax.ops.routing.call import Inputs, Options, Routes

BLOCK = 64  # pairs, or experts, of a program, and pairs of a step


def choose_kernel(
    inputs: Any, weights_ref: Any, experts_ref: Any, *, options: Options
) -> None:
    """Grid: tokens. As softmax and top_k: the lower of equal experts first."""
    scores, live = inputs
    E, row = scores.shape[1], pl.program_id(0)
    expert = indices(pl.next_power_of_2(E))
    is_expert = expert < E
    score = _triton.load(scores.at[row, expert], mask=is_expert, other=-jnp.inf)
    score = score.astype(jnp.float32)
    share = jnp.exp(score - jnp.max(score, axis=0))
    share = share / jnp.sum(share, axis=0)
    # NaN is larger than all, so that k different experts are chosen whatever there is
    rank = jnp.where(share == share, share, jnp.float32(jnp.inf))
    rank = jnp.where(is_expert, rank, np.float32(-1))
    slot = indices(pl.next_power_of_2(options.k))

    def take(i: Array, carry: tuple[Array, Array, Array]):
        rank, weights, experts = carry
        top = jnp.max(rank, axis=0)
        best = jnp.min(jnp.where(rank == top, expert, np.int32(E)), axis=0)
        weight = jnp.sum(jnp.where(expert == best, share, np.float32(0)), axis=0)
        weights = jnp.where(slot == i, weight, weights)
        experts = jnp.where(slot == i, best, experts)
        return jnp.where(expert == best, np.float32(-1), rank), weights, experts

    nothing = jnp.zeros(slot.shape, jnp.float32), jnp.zeros(slot.shape, jnp.int32)
    _, weights, experts = lax.fori_loop(
        np.int32(0), np.int32(options.k), take, (rank, *nothing)
    )
    if options.normalize:
        weights = weights / jnp.sum(weights, axis=0)
    if live is not None:
        is_live = _triton.load(live.at[row]) != 0
        experts = jnp.where(is_live, experts, np.int32(E))
    mask = slot < options.k
    _triton.store(weights_ref.at[row, slot], weights, mask=mask)
    _triton.store(experts_ref.at[row, slot], experts, mask=mask)


def sort_kernel(
    experts: Any, place_ref: Any, token_ref: Any, sizes_ref: Any, *, k: int
) -> None:
    """Grid: blocks of pairs, then blocks of experts, which count their pairs."""
    num_pairs, num_experts = experts.shape[0] * k, sizes_ref.shape[0]
    blocks = np.int32(pl.cdiv(num_pairs, BLOCK))
    program, lane = pl.program_id(0), indices(BLOCK)

    def load(pair: Array) -> Array:
        place = experts.at[pair // np.int32(k), pair % np.int32(k)]
        # past the last pair: an expert that none is before and none is
        return _triton.load(place, mask=pair < num_pairs, other=num_experts + 1)

    def count(is_counted) -> Array:
        def step(i: Array, total: Array) -> Array:
            pair = i * np.int32(BLOCK) + lane
            counted = is_counted(load(pair)[None, :], pair[None, :])
            return total + jnp.sum(counted.astype(jnp.int32), axis=1, dtype=jnp.int32)

        return lax.fori_loop(np.int32(0), blocks, step, jnp.zeros(BLOCK, jnp.int32))

    @pl.when(program < blocks)
    def _():
        pair = program * np.int32(BLOCK) + lane
        expert, own = load(pair)[:, None], pair[:, None]
        place = count(lambda e, p: (e < expert) | ((e == expert) & (p < own)))
        mask = pair < num_pairs
        token = pair // np.int32(k)
        _triton.store(place_ref.at[token, pair % np.int32(k)], place, mask=mask)
        place = jnp.where(mask, place, pair)  # the others' each their own, and masked
        _triton.store(token_ref.at[place], token, mask=mask)

    @pl.when(program >= blocks)
    def _():
        expert = (program - blocks) * np.int32(BLOCK) + lane
        total = count(lambda e, p: e == expert[:, None])
        _triton.store(sizes_ref.at[expert], total, mask=expert < num_experts)


def triton(
    x: Inputs, options: Options, config: None = None, *, interpret: bool = False
) -> Routes:
    del config
    L, E = x.scores.shape
    pairs = (L, options.k)
    live = None if x.live is None else x.live.astype(jnp.int32)
    weights, experts = _triton.launch(
        functools.partial(choose_kernel, options=options),
        Inputs(x.scores, live),
        ((pairs, jnp.float32), (pairs, jnp.int32)),
        grid=(L,),
        aliases={},
        num_warps=1,
        interpret=interpret,
    )
    place, token, sizes = _triton.launch(
        functools.partial(sort_kernel, k=options.k),
        experts,
        ((pairs, jnp.int32), ((L * options.k,), jnp.int32), ((E,), jnp.int32)),
        grid=(pl.cdiv(L * options.k, BLOCK) + pl.cdiv(E, BLOCK),),
        aliases={},
        num_warps=4,
        interpret=interpret,
    )
    return Routes(weights, place, token, sizes)
