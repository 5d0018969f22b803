"""A layer's step as one Pallas kernel (Triton lowering), and its launch.

A program owns a key head of a row and the value heads that read it. It convolves their
channels, walks their tokens with tile after tile of the states as `fused_update`'s
does, and normalises what came out. q, k, v and out pass from one to the next through
memory that no other program touches, and that is in a cache still: what is written
along channels is read in a tile's layout.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import both, indices, inside
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import GateLogits
from gdn_jax.ops.gated_delta.call import Inputs as RuleInputs
from gdn_jax.ops.gated_delta.clearing import clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile, unpack
from gdn_jax.ops.gated_delta.tokens import Tokens
from gdn_jax.ops.gated_delta.triton import Store, walk_tokens
from gdn_jax.ops.gated_delta.tuning import check_registers
from gdn_jax.ops.layer_step.call import Inputs, Options, find_rows
from gdn_jax.ops.layer_step.conv import MINUS_LOG2_E, Part, Ring
from gdn_jax.ops.layer_step.tuning import LayerStepConfig

AT_ONCE = 9  # tokens of a step with eight drafts


def layer_step_kernel(
    x: Any,
    buffer_ref,
    new_ref,
    q_ref,
    k_ref,
    out_ref,
    *,
    options: Options,
    config: LayerStepConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references. Grid: (key heads, rows); with `cu_seqlens` one row
    more, whose programs clear the tokens that belong to no row."""
    key, number = pl.program_id(0), pl.program_id(1)
    heads, is_row = options.heads, number < x.num_rows
    number = jnp.minimum(number, np.int32(x.num_rows - 1))
    row, conv_row = (
        each._replace(live=each.live & is_row, length=jnp.where(is_row, each.length, 0))
        for each in find_rows(x, options, number)
    )
    logits = x.weights.A_log, x.projected.a, x.projected.b, x.weights.dt_bias
    tokens = q_ref, k_ref, out_ref, GateLogits(*logits)
    rows = RuleInputs(x.recurrent, *tokens, *x.tables)
    multiply_add = (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add
    walk = _Walk(rows, new_ref, row, key, options, config, multiply_add)
    norm = _Norm.of(x, row, key, options)

    # What takes longest is on its way while the channels are convolved.
    first, gates = walk.load(jnp.int32(0)), walk.find_gates()
    _convolve(x, Ring.of(x, conv_row), key, options, buffer_ref, rows, interpret)
    if not interpret:
        _triton.barrier()
    walk.states(first, gates)
    if not interpret:
        _triton.barrier()
    norm.normalise(x, row, options, out_ref)

    if x.tables.cu_seqlens is not None:
        of_call = key, heads.H, config.tile, options.rule
        pl.when(~is_row)(lambda: clear_unowned(rows, new_ref, out_ref, *of_call))


class _Walk:
    """Over the states of a key head's value heads, tile after tile, the next of which
    is loaded before one is worked on."""

    def __init__(
        self,
        x: Any,
        new_ref: Any,
        row: Rows,
        key: Array,
        options: Options,
        config: LayerStepConfig,
        multiply_add: Any,
    ):
        self.x, self.row, self.options, self.config = x, row, options.rule, config.tile
        self.new_ref, self.multiply_add = new_ref, multiply_add
        self.heads, self.key = options.heads, key
        self.first = key * np.int32(self.heads.group)
        self.tiles = pl.cdiv(self.heads.V, config.block_v)

    def head(self, index: Array) -> Array:
        return self.first + lax.div(index, np.int32(self.tiles))

    def tile(self, index: Array) -> Tile:
        number = lax.rem(index, np.int32(self.tiles))
        return Tile.of(self.x.state, number, self.config)

    def load(self, index: Array) -> Any:
        """The last one again behind it."""
        index = jnp.minimum(index, np.int32(self.heads.group * self.tiles - 1))
        row, head = self.row, self.head(index)
        reads = row.live & row.keeps_state
        return self.tile(index).load_state(self.x.state, reads, row.read, head)

    def tokens(self, head: Array, tile: Tile) -> Tokens:
        arithmetic = rule.Arithmetic(tile.sum_k, self.multiply_add)
        b, a = self.heads.gates(self.key, head)
        return Tokens.of(self.x, head, tile, self.options, arithmetic, columns=(a, b))

    def find_gates(self) -> Any:
        """Of the one token of a row: [G] decays and betas of the value heads."""
        if self.options.tokens_per_row != 1:
            return None
        member = indices(pl.next_power_of_2(self.heads.group))
        head = jnp.minimum(self.first + member, np.int32(self.heads.HV - 1))
        tokens = self.tokens(head, self.tile(jnp.int32(0)))
        return tokens.gate(tokens.load_gates(self.row.begin))

    def states(self, first: Any, gates: Any) -> None:
        """`first` is the first tile, `gates` what `find_gates` found."""
        visit = self.walk_tokens
        if gates is not None:
            tokens = self.tokens(self.first, self.tile(jnp.int32(0)))
            keys = tokens.prepare(tokens.load_keys(self.row.begin))
            visit = functools.partial(self.take_one_token, keys, gates)
        count = self.heads.group * self.tiles
        if count == 1:
            visit(jnp.int32(0), first)
            return

        def step(index, loaded):
            index = jnp.asarray(index, jnp.int32)  # in x64 a loop counts in 64 bits
            following = self.load(index + 1)
            visit(index, loaded)
            return following

        lax.fori_loop(np.int32(0), np.int32(count), step, first)

    def store(self, head: Array) -> Store:
        return Store(self.x, self.new_ref, self.x.v, head, self.row, self.options)

    def take_one_token(self, keys: rule.Token, gates, index: Array, loaded) -> None:
        """`keys` are the same of all heads and tiles."""
        row, head, tile = self.row, self.head(index), self.tile(index)
        is_it = indices(gates[0].size) == head - self.first
        decay, beta = (jnp.sum(jnp.where(is_it, each, 0.0)) for each in gates)
        v = tile.load_v(self.x.v, row.begin, head).astype(jnp.float32)
        arithmetic = rule.Arithmetic(tile.sum_k, self.multiply_add)
        state, out = rule.update(unpack(loaded), keys, decay, beta, v, arithmetic)
        store, step = self.store(head), np.int32(0)
        store.token(tile, step, state, out, store.target(step), row.live)
        store.end(tile, state)

    def walk_tokens(self, index: Array, loaded) -> None:
        head, tile = self.head(index), self.tile(index)
        tokens = self.tokens(head, tile)
        walk_tokens(self.x, tile, loaded, tokens, self.store(head))


def _convolve(
    x: Any,
    ring: Ring,
    key: Array,
    options: Options,
    buffer_ref,
    rows: RuleInputs,
    interpret: bool,
) -> None:
    """Into q, k and v of `rows`."""
    heads, row = options.heads, ring.row
    value = key * np.int32(heads.group)
    sizes = heads.K, heads.K, heads.group * heads.V
    columns, _ = heads.columns(key, value)
    places = zip(heads.channels(key, value), columns, sizes, strict=True)
    parts = [Part.of(x, *place) for place in places]
    known = _known_tokens(options)
    ahead = [_load_tokens(x, row, parts, step) for step in range(known)]
    windows = [part.load_history(x, ring) for part in parts]
    if not interpret:
        _triton.barrier()
    if x.tables.num_accepted is not None:
        # what the next step finds before its tokens, if one of these stands
        for part, window in zip(parts, windows, strict=True):
            for i, value in enumerate(window[1:]):
                part.keep(buffer_ref, ring, i, value, True)

    def take(step, windows):
        at = _token_at(x, row, step)
        inputs = ahead[step] if ahead else _load_tokens(x, row, parts, step)
        moved = []
        for i, (part, new, window) in enumerate(
            zip(parts, inputs, windows, strict=True)
        ):
            window = [*window, new.astype(jnp.float32)]
            _store_channels(rows, i, key, heads, part, at, part.convolve(window))
            if x.tables.num_accepted is not None:
                behind = len(window) - 2 + step
                part.keep(buffer_ref, ring, behind, new, step < x.columns)
            moved.append(window[1:])
        return moved

    windows = _each_token(options, row, take, windows)
    if x.tables.num_accepted is None:
        for part, window in zip(parts, windows, strict=True):
            for i, value in enumerate(window):
                part.keep(buffer_ref, ring, i, value, True)


def _load_tokens(x: Any, row: Rows, parts: list[Part], step) -> list[Array]:
    at = _token_at(x, row, step)
    return [part.load_token(x, at) for part in parts]


def _token_at(x: Any, row: Rows, step) -> Array:
    return jnp.minimum(row.begin + step, np.int32(x.num_tokens - 1))


def _store_channels(
    rows: RuleInputs, which: int, key: Array, heads: Any, part: Part, at, y: Array
) -> None:
    ref: Any = (rows.q, rows.k, rows.v)[which]
    size = (heads.K, heads.K, heads.V)[which]
    first = key if which < 2 else key * np.int32(heads.group)
    place, size = indices(y.size), np.int32(size)
    to = ref.at[at, first + lax.div(place, size), lax.rem(place, size)]
    _triton.store(to, y.astype(ref.dtype), mask=part.mask)


class _Norm(NamedTuple):
    """Of a key head's value heads, [G V]. `gates` are z of tokens that were loaded
    beforehand, where it is known how many there are."""

    head: Array
    v: Array
    mask: Array | None
    column: Array
    weight: Array
    gates: list[Array]

    @classmethod
    def of(cls, x: Any, row: Rows, key: Array, options: Options) -> "_Norm":
        heads = options.heads
        member = indices(pl.next_power_of_2(heads.group))[:, None]
        v = indices(pl.next_power_of_2(heads.V))[None, :]
        in_group, in_v = inside(member[:, 0], heads.group), inside(v[0], heads.V)
        mask = both(in_group, in_v, shape=(member.size, v.size))
        first = key * np.int32(heads.group)
        _, z = heads.columns(key, first)
        column = z + member * np.int32(heads.V) + v
        at = x.weights.norm.at[jnp.broadcast_to(v, column.shape)]
        weight = _triton.load_where(at, mask)
        norm = cls(first + member, v, mask, column, weight, [])
        for step in range(_known_tokens(options)):
            norm.gates.append(norm.load_gate(x, row, step))
        return norm

    def load_gate(self, x: Any, row: Rows, step) -> Array:
        at = x.projected.z.at[_token_at(x, row, step), self.column]
        return _triton.load_where(at, self.mask)

    def normalise(self, x: Any, row: Rows, options: Options, out_ref) -> None:
        """In place."""

        def take(step, _):
            z = self.gates[step] if self.gates else self.load_gate(x, row, step)
            at = out_ref.at[_token_at(x, row, step), self.head, self.v]
            out = _triton.load_where(at, self.mask).astype(jnp.float32)
            mean = jnp.sum(out * out, axis=1) / np.float32(options.heads.V)
            scale = lax.rsqrt(mean + np.float32(options.eps))
            z = z.astype(jnp.float32)
            gate = 1.0 / (1.0 + jnp.exp2(z * MINUS_LOG2_E))
            gate = z * gate if options.activation == "silu" else gate
            y = out * scale[:, None] * self.weight.astype(jnp.float32) * gate
            y = jnp.where(row.live, y, 0.0).astype(out_ref.dtype)
            _triton.store(at, y, mask=self.mask)

        _each_token(options, row, take, None)


def _each_token(
    options: Options, row: Rows, take: Callable[[Any, Any], Any], carry: Any
) -> Any:
    """`take(step, carry)`; steps are Python's where a few are known."""
    if not _known_tokens(options):
        return lax.fori_loop(np.int32(0), row.length, take, carry)
    for step in range(_known_tokens(options)):
        carry = take(step, carry)
    return carry


def _known_tokens(options: Options) -> int:
    """Of each row, so few that all may be loaded at once; otherwise 0."""
    tokens = options.rule.tokens_per_row or 0
    return tokens if tokens <= AT_ONCE else 0


def triton(
    x: Inputs, options: Options, config: LayerStepConfig, *, interpret: bool = False
) -> tuple[ConvState, Array, Array]:
    """(conv, recurrent, out [L HV V]), in one launch, both states in place."""
    heads, num_tokens = options.heads, x.num_tokens
    if not interpret:
        check_registers(config, heads.K, tiles=2)
    keys = (num_tokens, heads.H, heads.K), options.rule.out_dtype
    values = (num_tokens, heads.HV, heads.V), options.rule.out_dtype
    written = (x.conv.buffer, x.recurrent)
    rows = x.num_rows + (x.tables.cu_seqlens is not None)
    buffer, recurrent, _, _, out = _triton.launch(
        functools.partial(
            layer_step_kernel, options=options, config=config, interpret=interpret
        ),
        x,
        (*((y.shape, y.dtype) for y in written), keys, keys, values),
        grid=(heads.H, rows),
        aliases={0: 0, 2: 1},  # of Inputs' leaves: buffer, start, recurrent, ..
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return ConvState(buffer, x.conv.start), recurrent, out
