"""The fused update as one Pallas kernel (Triton lowering), and its launch.

A program owns a few tiles of one value head's state for all tokens of one row of the
batch: it reads a tile once, walks the tokens with the tile in registers, and writes it
back in place. Gates, norms and read-out never leave the program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows, in_call
from gdn_jax.ops.gated_delta import rounding, rule
from gdn_jax.ops.gated_delta.call import Inputs, Options, find_rows
from gdn_jax.ops.gated_delta.clearing import clear, clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.gated_delta.tokens import Tokens
from gdn_jax.ops.gated_delta.tuning import (
    GROUP,
    MAX_HEAD_DIM,
    LaunchConfig,
    check_registers,
    find_walk,
)


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
    tiles = [
        Tile.of(x.state, group * config.tiles + i, config) for i in range(config.tiles)
    ]
    arithmetic = rule.Arithmetic(
        tiles[0].sum_k,
        (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add,
    )
    is_row = row < x.num_rows
    row = find_rows(x, options, in_call(row, x.num_rows, x.cu_seqlens is not None))
    if x.cu_seqlens is not None:
        length = jnp.where(is_row, row.length, 0)
        row = row._replace(length=length, live=row.live & is_row)
    tokens = Tokens.of(x, head, tiles[0], options, arithmetic)
    # with the tokens, so that no store waits for them
    count = 0 if x.rounding is None else x.rounding.shape[0]
    words = tuple(x.rounding[i] for i in range(count))
    store = Store(x, new_ref, out_ref, head, row, options, words)

    # All loads before any work: what is in flight decides the speed.
    reads = row.live & row.keeps_state
    loaded = [tile.load_state(x.state, reads, row.read, head) for tile in tiles]
    if straight:
        _take_one_token(x, tiles, loaded, tokens, store)
    else:
        for tile, state in zip(tiles, loaded, strict=True):
            walk_tokens(x, tile, state, tokens, store)

    if x.cu_seqlens is not None:
        groups = pl.cdiv(x.v.shape[2], config.block_v * config.tiles)
        program, programs = group + groups * head, groups * x.v.shape[1]

        @pl.when(~is_row)
        def _():
            clear_unowned(x, new_ref, out_ref, program, programs, config, options)


def _take_one_token(x: Any, tiles, loaded, tokens: Tokens, store: "Store") -> None:
    row = store.row
    keys, gates = tokens.load_keys(row.begin), tokens.load_gates(row.begin)
    target = store.target(np.int32(0))
    values = [tile.load_v(x.v, row.begin, store.head) for tile in tiles]
    # the sums of q and k while A_log, which no kernel read before, is on its way
    token = tokens.prepare(keys)
    decay, beta = tokens.gate(gates)
    for tile, state, v in zip(tiles, loaded, values, strict=True):
        state, v = unpack(state), v.astype(jnp.float32)
        state, out = rule.update(state, token, decay, beta, v, tokens.arithmetic)
        out, kept = jnp.where(row.live, out, 0.0), state
        if store.options.per_token_states:
            kept = tuple(jnp.where(row.live, part, 0.0) for part in state)
        store.token(tile, np.int32(0), kept, out, target, row.live)
        store.end(tile, state)


def walk_tokens(x: Any, tile: Tile, loaded, tokens: Tokens, store: "Store") -> None:
    """Loads a token while it works on the one before. A dead row takes no step."""
    row, last = store.row, np.int32(x.q.shape[0] - 1)
    # no registers to hold as many gates as k has values, or masks along K
    alone = tokens.per_k or tile.in_k is not None

    def load(step):
        """All that a step reads; past the row's end, what lies there."""
        at = jnp.minimum(row.begin + step, last)
        # q and k first: after v, ptxas takes 140 registers where 128 do (16 rows, bf16)
        keys = tokens.load_keys(at)
        logits = tokens.load_gates(at) if alone else None
        v = tile.load_v(x.v, at, store.head)
        return keys, logits, v, store.target(step)

    def take(find_gates, step, carry):
        state, (keys, logits, v, target) = carry
        following = load(step + 1)
        token, v = tokens.prepare(keys), v.astype(jnp.float32)
        decay, beta = find_gates(step, logits)
        state, out = rule.update(state, token, decay, beta, v, tokens.arithmetic)
        store.token(tile, step, state, out, target, True)
        return state, following

    def begin_carry():
        return unpack(loaded), load(np.int32(0))

    steps = jnp.where(row.live, row.length, np.int32(0))
    if alone:
        own = functools.partial(take, lambda step, logits: tokens.gate(logits))
        state, _ = lax.fori_loop(0, steps, own, begin_carry())
    else:
        is_one_group = find_walk(store.options.tokens_per_row, tokens.per_k) == "few"
        groups = _Groups(tokens, row.begin, last, steps)
        state, _ = groups.walk(begin_carry, take, is_one_group)
    dead = jnp.where(row.live, np.int32(0), row.length)
    store.clear(tile, dead)
    store.end(tile, state)


class _Groups(NamedTuple):
    """A row's tokens by groups. Every lane of a program would find the same gates; so a
    lane finds those of one token of a group, and each step takes them from there.

    `begin` is the row's first token, `last` the last of any row.
    """

    tokens: Tokens
    begin: Array
    last: np.int32
    steps: Array

    def walk(
        self, begin_carry: Callable[[], Any], take: Callable[..., Any], is_one: bool
    ) -> Any:
        size = np.int32(GROUP)
        loaded = self._load(np.int32(0))
        carry = begin_carry()
        if is_one:
            gates = self.tokens.gate(loaded)
            return self._walk_one(np.int32(0), gates, take, carry)

        def walk_next(number, carry):
            (loaded, carry), first = carry, number * size
            gates = self.tokens.gate(loaded)
            following = self._load(first + size)
            return following, self._walk_one(first, gates, take, carry)

        groups = (self.steps + size - 1) // size
        return lax.fori_loop(0, groups, walk_next, (loaded, carry))[1]

    def _load(self, first: Array | np.int32) -> Any:
        return self.tokens.load_gates(group_at(self.begin + first, self.last))

    def _walk_one(self, first, gates, take: Callable[..., Any], carry) -> Any:
        def pick(step, _):
            is_it = _members() == step - first
            return tuple(jnp.sum(jnp.where(is_it, each, 0.0)) for each in gates)

        end = jnp.minimum(self.steps, first + np.int32(GROUP))
        return lax.fori_loop(first, end, functools.partial(take, pick), carry)


def group_at(first: Array | np.int32, last: np.int32) -> Array:
    """The tokens of a group; past the last of all, where nothing lies, that one."""
    return jnp.minimum(first + _members(), last)


def _members() -> Array:
    return jnp.arange(GROUP, dtype=jnp.int32)


class Store(NamedTuple):
    """Where a row's results go; with a key's `words` states are rounded at random."""

    x: Any
    new_ref: Any
    out_ref: Any
    head: Array
    row: Rows
    options: Options
    words: tuple[Array, ...] = ()

    def target(self, step: Array | np.int32) -> Array | None:
        """The slot named for the state after that step, where there is a table."""
        slots, row = self.x.slots, self.row
        if slots is None or len(slots.shape) == 1:
            return None
        return slots[row.number, jnp.minimum(step, np.int32(slots.shape[1] - 1))]

    def token(
        self, tile: Tile, step, state, out: Array, target: Array | None, live
    ) -> None:
        """After one token: its out, and its state where each token's is stored."""
        at = self.row.begin + step
        tile.store_v(self.out_ref, out, at, self.head)
        self.keep(tile, step, state, target, live)

    def keep(self, tile: Tile, step, state, target: Array | None, live) -> None:
        at = self.row.begin + step
        if self.options.per_token_states:
            self._state(tile, state, True, at)
        elif target is not None:
            wanted = (step < self.x.slots.shape[1]) & live
            wanted &= self.options.is_live_slot(target, self.x.state.shape[0])
            target = jnp.where(wanted, target, 0)
            self._state(tile, state, wanted, target)

    def end(self, tile: Tile, state) -> None:
        """After the last token, where only its state is stored."""
        one_slot = self.x.slots is None or len(self.x.slots.shape) == 1
        if one_slot and not self.options.per_token_states:
            row = self.row
            self._state(tile, state, row.live, row.read)

    def _state(self, tile: Tile, state, wanted: Array | bool, place: Array) -> None:
        if self.words:
            K, dtype = self.x.state.shape[3], self.new_ref.dtype
            seeds = rounding.seeds(self.words, place, self.head)
            state = rounding.stored_tile(state, tile, seeds, K, dtype)
        tile.store_state(self.new_ref, state, wanted, place, self.head)

    def clear(self, tile: Tile, length: Array) -> None:
        begin, head = self.row.begin, self.head
        clear(self.new_ref, self.out_ref, begin, length, head, tile, self.options)


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
    if not interpret:
        check_registers(config, K)
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
