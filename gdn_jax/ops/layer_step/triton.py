"""A layer's step as one Pallas kernel (Triton lowering), and its launch.

A program owns a value head of a row, or some of its V. It convolves that head's
channels, walks its tokens with tile after tile of the state as `fused_update`'s does,
and normalises what came out. q, k, v and out pass from one to the next through memory
of the program's own, which is in a cache still: what is written along channels is read
in a tile's layout. Programs that share out V leave the norm to a second launch.
"""

import functools
from typing import Any

import jax
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
from gdn_jax.ops.layer_step.call import Inputs, Options, find_rows
from gdn_jax.ops.layer_step.conv import MINUS_LOG2_E, Part, Ring
from gdn_jax.ops.layer_step.tuning import LayerStepConfig


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
    config: LayerStepConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references. Grid: (splits of V, value heads, rows); with
    `cu_seqlens` one row more, whose programs clear the tokens that belong to no row."""
    split, head, number = (pl.program_id(i) for i in range(3))
    heads, is_row = options.heads, number < x.num_rows
    key = lax.div(head, np.int32(heads.group))
    number = jnp.minimum(number, np.int32(x.num_rows - 1))
    row, conv_row = (
        each._replace(live=each.live & is_row, length=jnp.where(is_row, each.length, 0))
        for each in find_rows(x, options, number)
    )
    gates = GateLogits(x.weights.A_log, x.projected.a, x.projected.b, x.weights.dt_bias)
    rows = RuleInputs(x.recurrent, q_ref, k_ref, out_ref, gates, *x.tables)
    tiles = _Tiles(rows, row, head, split, config)
    arithmetic = rule.Arithmetic(
        tiles.at(np.int32(0)).sum_k,
        (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add,
    )
    own = head * np.int32(config.splits) + split  # each program's q and k
    b, a = heads.gates(key, head)
    tokens = Tokens.of(
        rows,
        head,
        tiles.at(np.int32(0)),
        options.rule,
        arithmetic,
        key_head=own,
        columns=(a, b),
    )

    # What takes longest is on its way while the channels are convolved.
    first = tiles.load(jnp.int32(0))
    ring = Ring.of(x, conv_row)
    _convolve(x, ring, key, head, split, options, config, buffer_ref, rows)
    if not interpret:
        _triton.barrier()
    ring.arrive(start_ref, heads.HV * config.splits)
    store = Store(rows, new_ref, out_ref, head, row, options.rule)
    if options.rule.tokens_per_row == 1:
        tiles.walk(first, _one_token(tiles, tokens, store))
    else:
        tiles.walk(
            first, lambda tile, state: walk_tokens(rows, tile, state, tokens, store)
        )
    if config.splits == 1:
        if not interpret:
            _triton.barrier()
        _norm(x, row, key, head, options, out_ref)

    if x.tables.cu_seqlens is not None:
        program, programs = split + config.splits * head, config.splits * heads.HV

        @pl.when(~is_row)
        def _():
            clear_unowned(
                rows, new_ref, out_ref, program, programs, config.tile, options.rule
            )


def norm_kernel(inputs: Any, normed_ref, *, options: Options) -> None:
    """`inputs` are `Inputs` of references and what came out of the rule, which is
    `normed_ref` too. Grid: (value heads, rows)."""
    x, out_ref = inputs
    head, number = pl.program_id(0), pl.program_id(1)
    row, _ = find_rows(x, options, number)
    key = lax.div(head, np.int32(options.heads.group))
    _norm(x, row, key, head, options, out_ref, normed_ref)


class _Tiles:
    """A program's, one after another: the next is loaded before one is worked on."""

    def __init__(
        self, x: Any, row: Rows, head: Array, split: Array, config: LayerStepConfig
    ):
        self.x, self.row, self.head, self.config = x, row, head, config.tile
        self.count = config.tiles(x.state.shape[2])
        self.first = split * np.int32(self.count)

    def at(self, index: Array | np.int32) -> Tile:
        return Tile.of(self.x.state, self.first + index, self.config)

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
    split: Array,
    options: Options,
    config: LayerStepConfig,
    buffer_ref,
    rows: RuleInputs,
) -> None:
    """Into q, k and v of `rows`."""
    heads, row = options.heads, ring.row
    columns, _ = heads.columns(key, head)
    channels = heads.channels(key, head)
    sizes = heads.K, heads.K, heads.V // config.splits
    own = head * np.int32(config.splits) + split
    firsts = np.int32(0), np.int32(0), split * np.int32(sizes[2])  # of the head's
    parts = [
        Part.load(x, ring, channel + first, column + first, size)
        for channel, column, first, size in zip(
            channels, columns, firsts, sizes, strict=True
        )
    ]
    is_first = (head == key * np.int32(heads.group)) & (split == 0)
    owned = is_first, is_first, True  # who keeps what several programs read
    places = (rows.q, own), (rows.k, own), (rows.v, head)
    back, columns_kept = x.weights.conv.shape[1] - 1, x.columns

    def take(step, window):
        at = jnp.minimum(row.begin + step, np.int32(x.num_tokens - 1))
        inputs = [part.load_token(x, at) for part in parts]
        moved = []
        for part, (ref, lead), first, new, old, keeps in zip(
            parts, places, firsts, inputs, window, owned, strict=True
        ):
            full = [*old, new.astype(jnp.float32)]
            y = part.convolve(full).astype(ref.dtype)
            place = first + indices(part.channel.size)
            _triton.store(ref.at[at, lead, place], y, mask=part.mask)
            kept = keeps & (step < columns_kept)
            part.keep(buffer_ref, ring, back + step, new, kept)
            moved.append(full[1:])
        return moved

    if x.tables.has_state is not None:
        for part, keeps in zip(parts, owned, strict=True):
            part.forget(buffer_ref, ring, keeps)
    _each_token(options, row, take, [part.history for part in parts])


def _norm(
    x: Any,
    row: Rows,
    key: Array,
    head: Array,
    options: Options,
    out_ref,
    normed_ref=None,
) -> None:
    """In place, or into `normed_ref`."""
    normed_ref = out_ref if normed_ref is None else normed_ref
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
        y = jnp.where(row.live, y, 0.0).astype(normed_ref.dtype)
        _triton.store(normed_ref.at[at, head, place], y, mask=mask)

    _each_token(options, row, take, None)


def _each_token(options: Options, row: Rows, take: Any, carry: Any) -> Any:
    if options.rule.tokens_per_row is None:
        return lax.fori_loop(np.int32(0), row.length, take, carry)
    for step in range(options.rule.tokens_per_row):
        carry = take(np.int32(step), carry)
    return carry


def triton(
    x: Inputs, options: Options, config: LayerStepConfig, *, interpret: bool = False
) -> tuple[ConvState, Array, Array]:
    """(conv, recurrent, out [L HV V]), both states in place."""
    heads, num_tokens = options.heads, x.num_tokens
    keys = (num_tokens, heads.HV * config.splits, heads.K), options.rule.out_dtype
    values = (num_tokens, heads.HV, heads.V), options.rule.out_dtype
    written = x.conv.buffer, x.conv.start, x.recurrent
    rows = x.num_rows + (x.tables.cu_seqlens is not None)
    buffer, start, recurrent, _, _, out = _triton.launch(
        functools.partial(
            layer_step_kernel, options=options, config=config, interpret=interpret
        ),
        x,
        (*((y.shape, y.dtype) for y in written), keys, keys, values),
        grid=(config.splits, heads.HV, rows),
        aliases={0: 0, 1: 1, 2: 2},  # the first leaves of Inputs
        num_warps=config.num_warps,
        interpret=interpret,
    )
    if config.splits > 1:
        inputs = x._replace(conv=ConvState(buffer, start), recurrent=recurrent), out
        [out] = _triton.launch(
            functools.partial(norm_kernel, options=options),
            inputs,
            (values,),
            grid=(heads.HV, x.num_rows),
            aliases={len(jax.tree.leaves(inputs)) - 1: 0},
            num_warps=1,
            interpret=interpret,
        )
    return ConvState(buffer, start), recurrent, out
