"""The fused update as one Pallas kernel (Triton lowering), and its launch.

A program owns a few tiles of one value head's state for all tokens of one row of the
batch: it reads a tile once, walks the tokens with the tile in registers, and writes it
back in place. Gates, norms and read-out never leave the program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Gates, Inputs, Options
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.gated_delta.tuning import LaunchConfig

MAX_HEAD_DIM = 256
ROWS_AT_ONCE = 512  # of cu_seqlens, in the registers of one warp


def fused_update_kernel(
    x: Any,
    new_ref,
    out_ref,
    *,
    options: Options,
    config: LaunchConfig,
    interpret: bool,
    straight: bool,
) -> None:
    """`x` is `Inputs` of references; `new_ref` is the pool itself, or the per-token
    states where those were asked for.

    Grid: (groups of tiles along V, value heads, rows); with `cu_seqlens` one row more,
    whose programs clear the tokens that belong to no row. `straight`: one token a row,
    without the loop over tokens.
    """
    group, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    is_row = row < x.num_rows
    row = jnp.minimum(row, np.int32(x.num_rows - 1))
    begin, length, slot, live = _find_row(x, row, is_row, options)
    reads = live if x.has_state is None else live & x.has_state[row]
    checkpoints = x.slots is not None and len(x.slots.shape) == 2
    tiles = [
        Tile.of(x.state, group * config.tiles + i, config) for i in range(config.tiles)
    ]
    arithmetic = rule.Arithmetic(
        tiles[0].sum_k,
        (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add,
    )
    load_token, prepare = _token_steps(x, head, tiles[0], options, arithmetic)

    def load_target(step):
        """The slot named for the state after that step."""
        if not checkpoints:
            return None
        return x.slots[row, jnp.minimum(step, np.int32(x.slots.shape[1] - 1))]

    def load_step(tile: Tile, step):
        """All that a step reads; past the row's end, what lies there."""
        at = jnp.minimum(begin + step, np.int32(x.q.shape[0] - 1))
        return load_token(at), tile.load_v(x.v, at, head), load_target(step)

    def or_zeros(value):
        return jnp.where(live, value, 0.0) if straight else value

    def advance(tile: Tile, step, state, token, v, target):
        """A loop takes no step for a dead row; without a loop its stores are masked."""
        at = begin + step
        state, out = rule.update(state, token, v.astype(jnp.float32), arithmetic)
        tile.store_v(out_ref, or_zeros(out), at, head)
        if options.per_token_states:
            kept = tuple(or_zeros(part) for part in state)
            tile.store_state(new_ref, kept, True, at, head)
        elif checkpoints:
            wanted = (step < x.slots.shape[1]) & (live if straight else True)
            wanted &= options.is_live_slot(target, x.state.shape[0])
            target = jnp.where(wanted, target, 0)
            tile.store_state(new_ref, state, wanted, target, head)
        return state

    # All loads before any work: what is in flight decides the speed.
    loaded = [tile.load_state(x.state, reads, slot, head) for tile in tiles]
    if straight:
        token, target = load_token(begin), load_target(np.int32(0))
        values = [tile.load_v(x.v, begin, head) for tile in tiles]
        token = prepare(token)
    for i, tile in enumerate(tiles):
        state = unpack(loaded[i])
        if straight:
            state = advance(tile, np.int32(0), state, token, values[i], target)
        else:

            def body(step, carry, tile=tile):
                state, (token, v, target) = carry
                following = load_step(tile, step + 1)
                state = advance(tile, step, state, prepare(token), v, target)
                return state, following

            count = jnp.where(live, length, np.int32(0))
            first = load_step(tile, np.int32(0))
            state, _ = lax.fori_loop(0, count, body, (state, first))
            dead = jnp.where(live, np.int32(0), length)
            _clear(new_ref, out_ref, begin, dead, head, tile, options)
        if not (options.per_token_states or checkpoints):
            tile.store_state(new_ref, state, live, slot, head)

    if x.cu_seqlens is not None:
        groups = pl.cdiv(x.v.shape[2], config.block_v * config.tiles)
        program = group + groups * head

        @pl.when(~is_row)
        def _():
            _clear_unowned(x, new_ref, out_ref, program, config, options)


def _find_row(x: Any, row: Array, is_row, options: Options) -> tuple[Array, ...]:
    """(begin, length, slot, live) of one row: `call.find_rows` for scalars."""
    num_slots, num_tokens = x.state.shape[0], x.q.shape[0]
    if x.cu_seqlens is None:
        length = jnp.int32(options.tokens_per_row)
        begin, live = row * length, is_row
    else:
        begin = jnp.clip(x.cu_seqlens[row], 0, num_tokens)
        length = jnp.clip(x.cu_seqlens[row + 1], 0, num_tokens) - begin
        length = jnp.where(is_row, jnp.maximum(length, 0), 0)
        live = length > 0
    if x.slots is None:
        slot = row
    elif len(x.slots.shape) == 1:
        slot = x.slots[row]
    else:
        columns = x.slots.shape[1]
        accepted = x.num_accepted[row]
        live &= (accepted >= 1) & (accepted <= columns)
        slot = x.slots[row, jnp.clip(accepted - 1, 0, columns - 1)]
    live &= options.is_live_slot(slot, num_slots)
    return begin, length, jnp.where(live, slot, 0), live


def _token_steps(
    x: Any, head: Array, tile: Tile, options: Options, arithmetic: rule.Arithmetic
) -> tuple[Callable[[Array], Any], Callable[[Any], rule.Token]]:
    """(load, prepare): a token's place to what memory holds of it, and that to what
    the update takes. A loop loads a token while it works on the one before."""
    key_head = head // (x.v.shape[1] // x.k.shape[1])
    per_k = len(x.gates.per_token[0].shape) == 3  # KDA: one decay for each of K

    def load_decay(ref, *index) -> rule.Chunks:
        return tile.load_k(ref, *index) if per_k else (ref[index],)

    def float_decay(loaded: rule.Chunks) -> rule.Chunks:
        return unpack(loaded) if per_k else (loaded[0].astype(jnp.float32),)

    if not isinstance(x.gates, Gates):
        A_log = x.gates.A_log[head].astype(jnp.float32)
        dt_bias = float_decay(load_decay(x.gates.dt_bias, head))

    def load(at: Array):
        q, k = (tile.load_k(ref, at, key_head) for ref in (x.q, x.k))
        a, b = x.gates.per_token
        return q, k, load_decay(a, at, head), b[at, head]

    def prepare(loaded) -> rule.Token:
        q, k, a, b = loaded
        a, b = float_decay(a), b.astype(jnp.float32)
        if isinstance(x.gates, Gates):
            log_decay, beta = a, b
        else:
            log_decay = tuple(
                rule.log_decay(A_log, logits, bias, options.gating)
                for logits, bias in zip(a, dt_bias, strict=True)
            )
            beta = rule.beta(b, options.gating)
        return rule.prepare(
            unpack(q),
            unpack(k),
            log_decay if per_k else log_decay[0],
            beta,
            arithmetic,
            scale=options.scale,
            qk_l2norm=options.qk_l2norm,
        )

    return load, prepare


def _clear(new_ref, out_ref, begin, length, head, tile: Tile, options: Options) -> None:
    """Zeros for tokens that belong to no live row."""

    def clear(step, _):
        at = begin + step
        tile.store_v(out_ref, jnp.zeros(tile.v.shape), at, head)
        if options.per_token_states:
            tile.store_state(new_ref, tile.zeros(), True, at, head)

    lax.fori_loop(0, length, clear, None)


def _clear_unowned(
    x: Any, new_ref, out_ref, program: Array, config: LaunchConfig, options: Options
) -> None:
    """Clears the tokens that `cu_seqlens` gives to no row. The programs of the extra
    row share the tokens out; one that finds such a token clears it for all heads."""
    num_tokens, heads, V = x.v.shape
    tiles = np.int32(pl.cdiv(V, config.block_v))
    programs = pl.cdiv(V, config.block_v * config.tiles) * heads
    block = min(pl.next_power_of_2(x.num_rows), ROWS_AT_ONCE)

    def is_owned(at):
        def look(turn, found):
            row = turn * block + jnp.arange(block, dtype=jnp.int32)
            is_row = row < x.num_rows
            begin = _triton.load(x.cu_seqlens.at[row], mask=is_row, other=0)
            end = _triton.load(x.cu_seqlens.at[row + 1], mask=is_row, other=0)
            here = ((begin <= at) & (at < end)).astype(jnp.int32)
            return jnp.maximum(found, jnp.max(here))

        turns = np.int32(pl.cdiv(x.num_rows, block))
        return lax.fori_loop(np.int32(0), turns, look, jnp.int32(0))

    def visit(turn, _):
        at = program + turn * programs
        owned = is_owned(at)

        def clear(part, _):
            head, index = lax.div(part, tiles), lax.rem(part, tiles)
            tile = Tile.of(x.state, index, config)
            _clear(new_ref, out_ref, at, 1, head, tile, options)

        parts = jnp.where(owned > 0, np.int32(0), np.int32(tiles * heads))
        lax.fori_loop(0, parts, clear, None)

    turns = (num_tokens - program + programs - 1) // programs
    lax.fori_loop(0, turns, visit, None)


def triton(
    x: Inputs,
    options: Options,
    config: LaunchConfig,
    *,
    interpret: bool = False,
    straight: bool | None = None,
) -> tuple[Array, Array]:
    """One launch; the pool is aliased in place unless per-token states are returned.

    One token a row needs no loop. On a GPU leaving it out changes no bit: the
    arithmetic is spelled out, FMA included. XLA on a CPU contracts products into sums
    as it likes, so the interpreter keeps the loop unless `straight` says otherwise.
    """
    if straight is None:
        straight = options.tokens_per_row == 1 and not interpret
    V, K = x.state.shape[2:]
    if max(K, V) > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dims up to {MAX_HEAD_DIM} fit a program's registers; got {K=}, "
            f"{V=}. Use implementation='xla'."
        )
    rows = x.num_rows + (x.cu_seqlens is not None)
    grid = (pl.cdiv(V, config.block_v * config.tiles), x.v.shape[1], rows)
    new = x.state.shape
    if options.per_token_states:
        new = (x.q.shape[0], *new[1:])
    return _triton.launch(
        functools.partial(
            fused_update_kernel,
            options=options,
            config=config,
            interpret=interpret,
            straight=straight,
        ),
        x,
        ((new, x.state.dtype), (x.v.shape, options.out_dtype)),
        grid=grid,
        # the pool is the first leaf of Inputs
        aliases={} if options.per_token_states else {0: 0},
        num_warps=config.num_warps,
        interpret=interpret,
    )
