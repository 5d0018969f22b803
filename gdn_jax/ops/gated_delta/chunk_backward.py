"""Gradients of the chunked update: the two kernels that walk, and what is around them.

With the letters of chunk_xla.py, dX the cotangent of X, N = (I + A)^-1 - I and
Y = beta (V - (k exp G) S^T):

    dF = (k exp(G_C - G)) dS'^T              dY = (B + B N)^T dO + dF + N^T dF
    dS = exp(G_C) dS' + dO^T (q exp G) - (beta dY)^T (k exp G)
    dV = beta dY        dB = dO U^T        dA = -dY U^T        beta dbeta = dY . U

`enter_kernel` walks a row forward for the states that enter its chunks and U,
`leave_kernel` backward for the cotangents of the states that leave them and dY. Then
chunk_pull.py has all that it needs of every chunk, side by side. The norms' gradients
and those of the gates' own arguments, elementwise, are XLA's. Products take two parts:
an error here is not carried on from state to state as in the forward pass.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops import ragged
from gdn_jax.ops.batch import Rows, find_owners
from gdn_jax.ops.blocks import padded
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    Gates,
    Inputs,
    Options,
    find_rows,
)
from gdn_jax.ops.gated_delta.chunk_memory import CHUNK, Keys
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, cut_array, join, wide_dot
from gdn_jax.ops.gated_delta.chunk_prepare import Prepared, prepare
from gdn_jax.ops.gated_delta.chunk_pull import Given, Pulled, Walked, pull
from gdn_jax.ops.gated_delta.chunk_triton import Walk, find_error
from gdn_jax.ops.gated_delta.tuning import ChunkConfig


class _Tile(NamedTuple):
    """Of V, of one value head's state, for a row's walk."""

    row: Rows
    head: Array
    v: Array  # [V]
    k: Array  # [K]

    @classmethod
    def of(cls, x: Any, options: Options, config: ChunkConfig) -> "_Tile":
        tile, head, number = (pl.program_id(n) for n in range(3))
        v = tile * config.block_v + jnp.arange(config.block_v, dtype=jnp.int32)
        k = jnp.arange(padded(x.state.shape[3]), dtype=jnp.int32)
        return cls(find_rows(x, options, number), head, v, k)

    def load(self, pool: Any, wanted: Array) -> Array:
        place, inside = self._at(pool)
        state = _triton.load(place, mask=inside & wanted, other=0)
        return state.astype(jnp.float32)

    def store(self, pool: Any, state: Array) -> None:
        place, inside = self._at(pool)
        mask = inside & self.row.live
        _triton.store(place, state.astype(pool.dtype), mask=mask)

    def _at(self, pool: Any) -> tuple[Any, Array]:
        v, k = self.v[None, :], self.k[:, None]
        inside = (v < pool.shape[2]) & (k < pool.shape[3])
        return pool.at[self.row.read, self.head, v, k], inside

    def store_state(self, refs: Any, parts: Parts, number: Array) -> None:
        """Of a chunk; [M HV K V]"""
        v, k = self.v[None, :], self.k[:, None]
        inside = (v < refs[0].shape[3]) & (k < refs[0].shape[2])
        for ref, part in zip(refs, parts, strict=True):
            place = ref.at[number, self.head, k, v]
            _triton.store(place, part, mask=inside)


def enter_kernel(
    inputs: tuple[Any, Keys, Prepared],
    *outputs: Any,
    options: Options,
    config: ChunkConfig,
) -> None:
    """Grid: (tiles of V, value heads, rows)."""
    x, keys, prepared = inputs
    entering, u_refs = outputs[:2], outputs[2:]
    tile = _Tile.of(x, options, config)
    walk = Walk.of(x, keys, prepared, tile.row, tile.head)

    def advance(step, carry):
        state, factors = carry
        chunk, (_, k) = walk.chunk(step)
        parts = cut(state)
        tile.store_state(entering, parts, chunk.number)
        error = find_error(chunk.load(x.v, tile.v), k, parts, factors)
        u = error + wide_dot(chunk.load_square(prepared.inverse), cut(error))
        chunk.store_parts(u_refs, tile.v, cut(u))
        following = walk.factors(step + 1)
        folded = wide_dot(k, cut(u * factors.fold[:, None]), trans_x=True)
        return state * factors.decay + folded, following

    state = tile.load(x.state, tile.row.keeps_state)
    carry = state, walk.factors(jnp.int32(0))
    lax.fori_loop(np.int32(0), walk.steps, advance, carry)


def leave_kernel(
    inputs: tuple[Any, Any, Keys, Prepared, Any],
    dstate_ref: Any,
    *outputs: Any,
    options: Options,
    config: ChunkConfig,
) -> None:
    """Grid: (tiles of V, value heads, rows). The pool's cotangent is updated in place:
    of the slots that rows wrote it becomes that of the state they started from."""
    dnew, x, keys, prepared, dout = inputs
    leaving, dy_refs = outputs[:2], outputs[2:]
    tile = _Tile.of(x, options, config)
    walk = Walk.of(x, keys, prepared, tile.row, tile.head)

    def retreat(turn, carry):
        dstate, factors = carry
        step = walk.steps - 1 - turn
        chunk, (q, k) = walk.chunk(step)
        parts = cut(dstate)
        tile.store_state(leaving, parts, chunk.number)
        do = chunk.load_parts(dout, tile.v)
        asked = cut(join(do) * factors.query[:, None])
        dstate = dstate * factors.decay + wide_dot(q, asked, trans_x=True)
        df = wide_dot(k, parts) * factors.fold[:, None]
        dy = df + wide_dot(chunk.load_square(prepared.inverse), cut(df), trans_x=True)
        dy += wide_dot(chunk.load_square(prepared.scores), do, trans_x=True)
        chunk.store_parts(dy_refs, tile.v, cut(dy))
        following = walk.factors(step - 1)
        read = cut(dy * (factors.beta * factors.read)[:, None])
        return dstate - wide_dot(k, read, trans_x=True), following

    dstate = tile.load(dnew, tile.row.live)
    carry = dstate, walk.factors(walk.steps - 1)
    dstate, _ = lax.fori_loop(np.int32(0), walk.steps, retreat, carry)
    tile.store(dstate_ref, jnp.where(tile.row.keeps_state, dstate, 0.0))


def chunk_backward(
    x: Inputs,
    options: Options,
    config: ChunkConfig,
    cotangents: tuple[Array, Array],
    *,
    interpret: bool = False,
) -> Inputs:
    """Cotangents of the inputs. The states that enter chunks are computed again: kept
    from the forward pass they would be a state for every 64 tokens."""
    dnew, dout = cotangents
    keys, dout = Keys.of(x, options), cut_array(dout)
    prepared = prepare(x, keys, options, config, interpret)
    dstate, walked = _walk(x, keys, prepared, dnew, dout, options, config, interpret)
    given = Given(x, keys, prepared, dout, walked)
    pulled = pull(given, options, config, interpret)
    return _assemble(x, options, prepared, dstate, pulled)


def _walk(
    x: Inputs,
    keys: Keys,
    prepared: Prepared,
    dnew: Array,
    dout: Any,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> tuple[Array, Walked]:
    (L, HV, V), K = x.v.shape, x.state.shape[3]
    chunks = ragged.most_blocks(L, x.num_rows, CHUNK)
    states = [((chunks, HV, K, V), jnp.bfloat16)] * 2
    values = [((L, HV, V), jnp.bfloat16)] * 2
    run = functools.partial(
        _triton.launch,
        grid=(pl.cdiv(V, config.block_v), HV, x.num_rows),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    static = dict(options=options, config=config)
    entered = run(
        functools.partial(enter_kernel, **static),
        (x, keys, prepared),
        states + values,
        aliases={},
    )
    dstate, *left = run(
        functools.partial(leave_kernel, **static),
        (dnew, x, keys, prepared, dout),
        [(dnew.shape, dnew.dtype), *states, *values],
        aliases={0: 0},
    )
    pairs = (tuple(y) for y in (entered[:2], entered[2:], left[:2], left[2:]))
    return dstate, Walked(*pairs)


def _assemble(
    x: Inputs, options: Options, prepared: Prepared, dstate: Array, pulled: Pulled
) -> Inputs:
    """What the kernels left for tokens of live rows alone, through norms and gates."""
    rows = find_rows(x, options)
    *_, live = find_owners(rows, x.q.shape[0], options.tokens_per_row)

    def select(y: Array) -> Array:
        return jnp.where(live.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)

    def of_key(y: Array, gradient: Array, along: Array) -> Array:
        """Through y / |y|, of all value heads that read it."""
        gradient = select(gradient).reshape(*y.shape[:2], -1, y.shape[2]).sum(axis=2)
        if options.qk_l2norm:
            along = select(along.T).reshape(*y.shape[:2], -1).sum(axis=2)
            gradient -= select(y).astype(jnp.float32) * along[..., None]
        return gradient.astype(y.dtype)

    gates = x.gates._replace(
        **{name: select(getattr(x.gates, name)) for name in x.gates.PER_TOKEN}
    )
    cotangents = Gates(select(pulled.log_decay.sum(axis=0).T), select(pulled.beta.T))
    _, pull_gates = jax.vjp(functools.partial(_gates, options=options), gates)
    [dgates] = pull_gates(cotangents)
    along_q = pulled.along_q.sum(axis=0) * (prepared.q_factor / options.scale) ** 2
    along_k = pulled.along_k.sum(axis=0) * prepared.factors.k_factor**2
    zeros = (None,) * 4
    return Inputs(
        dstate,
        of_key(x.q, pulled.q, along_q),
        of_key(x.k, pulled.k, along_k),
        select(pulled.v),
        dgates,
        *zeros,
    )


def _gates(logits: GateLogits, *, options: Options) -> Gates:
    A_log, a, b, dt_bias = (y.astype(jnp.float32) for y in logits)
    return Gates(
        rule.log_decay(A_log, a, dt_bias, options.gating), rule.beta(b, options.gating)
    )
