"""A layer's step as one Pallas kernel (Triton lowering), and its launch.

A program owns a value head of a row. It convolves that head's channels, walks its
tokens with tile after tile of the state as `fused_update`'s does, and normalises what
came out. q, k, v and out pass between these through memory of the program's own, which
no cache line has left: what is written along channels is read in a tile's layout.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import indices, inside
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import GateLogits
from gdn_jax.ops.gated_delta.call import Inputs as RuleInputs
from gdn_jax.ops.gated_delta.clearing import clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.gated_delta.tokens import Tokens
from gdn_jax.ops.gated_delta.triton import Store, walk_tokens
from gdn_jax.ops.gated_delta.tuning import LaunchConfig
from gdn_jax.ops.layer_step.call import Inputs, Options, find_rows
from gdn_jax.ops.layer_step.conv import MINUS_LOG2_E, Part, Ring


def layer_step_kernel(
    x: Any,
    buffer_ref,
    start_ref,
    new_ref,
    q_ref,
    k_ref,
    out_ref,
    *,
    options: Options,
    config: LaunchConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references. Grid: (value heads, rows); with `cu_seqlens` one
    row more, whose programs clear the tokens that belong to no row."""
    head, number = pl.program_id(0), pl.program_id(1)
    heads, is_row = options.heads, number < x.num_rows
    key = lax.div(head, np.int32(heads.group))
    number = jnp.minimum(number, np.int32(x.num_rows - 1))
    row, conv_row = (
        each._replace(live=each.live & is_row, length=jnp.where(is_row, each.length, 0))
        for each in find_rows(x, options, number)
    )
    gates = GateLogits(x.weights.A_log, x.projected.a, x.projected.b, x.weights.dt_bias)
    rows = RuleInputs(x.recurrent, q_ref, k_ref, out_ref, gates, *x.tables)
    tiles = _Tiles(rows, row, head, config)
    arithmetic = rule.Arithmetic(
        tiles.at(0).sum_k,
        (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add,
    )
    tokens = Tokens.of(rows, head, tiles.at(0), options.rule, arithmetic)
    b, a = heads.gates(key, head)
    tokens = tokens._replace(
        load_gates=lambda at: ((x.projected.a[at, a],), x.projected.b[at, b])
    )

    # What takes longest is on its way while the channels are convolved.
    first = tiles.load(np.int32(0))
    ring = Ring.of(x, conv_row, options)
    _convolve(x, ring, key, head, options, buffer_ref, (q_ref, k_ref, out_ref))
    if not interpret:
        _triton.barrier()
    ring.arrive(start_ref, heads.HV)
    store = Store(rows, new_ref, out_ref, head, row, options.rule)
    if options.rule.tokens_per_row == 1:
        tiles.walk(first, _one_token(tiles, tokens, store))
    else:
        tiles.walk(
            first, lambda tile, state: walk_tokens(rows, tile, state, tokens, store)
        )
    if not interpret:
        _triton.barrier()
    _norm(x, row, key, head, options, out_ref)

    if x.tables.cu_seqlens is not None:

        @pl.when(~is_row)
        def _():
            clear_unowned(rows, new_ref, out_ref, head, config, options.rule)


class _Tiles:
    """Of a value head, one after another: the next is loaded before one is worked on."""

    def __init__(self, x: Any, row: Rows, head: Array, config: LaunchConfig):
        self.x, self.row, self.head, self.config = x, row, head, config
        self.count = pl.cdiv(x.state.shape[2], config.block_v)

    def at(self, index: Array | int) -> Tile:
        return Tile.of(self.x.state, index, self.config)

    def load(self, index: Array) -> Any:
        """The last one again behind it."""
        index = jnp.minimum(index, np.int32(self.count - 1))
        reads = self.row.live & self.row.keeps_state
        return self.at(index).load_state(self.x.state, reads, self.row.read, self.head)

    def walk(self, first: Any, visit: Any) -> None:
        if self.count == 1:
            visit(self.at(np.int32(0)), first)
            return

        def step(index, loaded):
            following = self.load(index + 1)
            visit(self.at(index), loaded)
            return following

        lax.fori_loop(np.int32(0), np.int32(self.count), step, first)


def _one_token(tiles: _Tiles, tokens: Tokens, store: Store) -> Any:
    """What a row of one token does to each tile."""
    row = store.row
    token = tokens.prepare(tokens.load_keys(row.begin))
    decay, beta = tokens.gate(tokens.load_gates(row.begin))
    target = store.target(np.int32(0))

    def visit(tile: Tile, loaded) -> None:
        v = tile.load_v(store.out_ref, row.begin, store.head).astype(jnp.float32)
        state, out = rule.update(
            unpack(loaded), token, decay, beta, v, tokens.arithmetic
        )
        store.token(tile, np.int32(0), state, out, target, row.live)
        store.end(tile, state)

    return visit


def _convolve(
    x: Any,
    ring: Ring,
    key: Array,
    head: Array,
    options: Options,
    buffer_ref,
    refs: tuple[Any, Any, Any],
) -> None:
    """Into `refs`, of q, k and v."""
    heads, row = options.heads, ring.row
    columns, _ = heads.columns(key, head)
    sizes = heads.K, heads.K, heads.V
    channels = heads.channels(key, head)
    parts = [
        Part.load(x, ring, *where)
        for where in zip(channels, columns, sizes, strict=True)
    ]
    is_first = head == key * np.int32(heads.group)
    owned = is_first, is_first, True  # who keeps what several programs read
    back, columns_kept = x.weights.conv.shape[1] - 1, x.columns

    def take(step, window):
        at = jnp.minimum(row.begin + step, np.int32(x.num_tokens - 1))
        inputs = [part.load_token(x, at) for part in parts]
        moved = []
        for part, ref, new, old, own in zip(
            parts, refs, inputs, window, owned, strict=True
        ):
            full = [*old, new.astype(jnp.float32)]
            y = part.convolve(full).astype(ref.dtype)
            place = indices(part.channel.size)
            _triton.store(ref.at[at, head, place], y, mask=part.mask)
            kept = own & (step < columns_kept)
            part.keep(buffer_ref, ring, back + step, new, kept)
            moved.append(full[1:])
        return moved

    for part, own in zip(parts, owned, strict=True):
        if x.tables.has_state is not None:
            part.forget(buffer_ref, ring, own)
    _each_token(options, row, take, [part.history for part in parts])


def _norm(x: Any, row: Rows, key: Array, head: Array, options: Options, out_ref):
    heads = options.heads
    place = indices(pl.next_power_of_2(heads.V))
    mask = inside(place, heads.V)
    _, z_column = heads.columns(key, head)

    def load(at):
        other = None if mask is None else 0
        return _triton.load(at, mask=mask, other=other).astype(jnp.float32)

    weight = load(x.weights.norm.at[place])

    def take(step, _):
        at = jnp.minimum(row.begin + step, np.int32(x.num_tokens - 1))
        z = load(x.projected.z.at[at, z_column + place])
        out = load(out_ref.at[at, head, place])
        mean = jnp.sum(out * out) / np.float32(heads.V)
        gate = 1.0 / (1.0 + jnp.exp2(z * MINUS_LOG2_E))
        gate = z * gate if options.activation == "silu" else gate
        y = out * lax.rsqrt(mean + np.float32(options.eps)) * weight * gate
        y = jnp.where(row.live, y, 0.0).astype(out_ref.dtype)
        _triton.store(out_ref.at[at, head, place], y, mask=mask)

    _each_token(options, row, take, None)


def _each_token(options: Options, row: Rows, take: Any, carry: Any) -> Any:
    if options.rule.tokens_per_row is None:
        return lax.fori_loop(np.int32(0), row.length, take, carry)
    for step in range(options.rule.tokens_per_row):
        carry = take(np.int32(step), carry)
    return carry


def triton(
    x: Inputs, options: Options, config: LaunchConfig, *, interpret: bool = False
) -> tuple[ConvState, Array, Array]:
    """(conv, recurrent, out [L HV V]), in one launch, both states in place."""
    heads, num_tokens = options.heads, x.num_tokens
    keys = (num_tokens, heads.HV, heads.K), options.rule.out_dtype
    values = (num_tokens, heads.HV, heads.V), options.rule.out_dtype
    written = x.conv.buffer, x.conv.start, x.recurrent
    rows = x.num_rows + (x.tables.cu_seqlens is not None)
    buffer, start, recurrent, _, _, out = _triton.launch(
        functools.partial(
            layer_step_kernel, options=options, config=config, interpret=interpret
        ),
        x,
        (*((y.shape, y.dtype) for y in written), keys, keys, values),
        grid=(heads.HV, rows),
        aliases={0: 0, 1: 1, 2: 2},  # the first leaves of Inputs
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return ConvState(buffer, start), recurrent, out
