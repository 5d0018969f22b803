"""The recurrence in chunks of the token axis, in plain JAX: the WY form.

Within a chunk of C tokens that starts from the state S [V K], with G the running sum of
the log-decays (of KDA one for each of K), rows of U solve a triangular system:

    A_ij = beta_i (k_i exp(G_i - G_j)) . k_j       (i > j)
    B_ij =        (q_i exp(G_i - G_j)) . k_j       (i >= j)
    U    = (I + A)^-1 diag(beta) (V - (k exp G) S^T)
    O    = (q exp G) S^T + B U
    S'   = exp(G_C) S + U^T (k exp(G_C - G))

All but the last two lines' S is known before any state is: it is computed for all
chunks at once, and a scan carries the state through them. Source: Yang, Kautz,
Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464), section 3; the WY form is that
of Yang et al., "Parallelizing Linear Transformers with the Delta Rule"
(arXiv:2406.06484).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    Inputs,
    Options,
    find_rows,
    write_slots,
)

CHUNK = 64
SUBCHUNK = 16  # KDA: decays are factored around the borders of these


class Chunks(NamedTuple):
    """Which tokens each chunk holds: [lanes steps], `tokens` and `valid` with C more.

    Dense rows are lanes side by side; packed rows follow each other in one lane.
    """

    row: Array
    first: Array  # is the first chunk of its row
    tokens: Array
    valid: Array


class Prepared(NamedTuple):
    """All of a chunk that no state is needed for, [.. H G C ..]; G heads share a key.

    U = values - keys S^T, O = queries S^T + scores U, S' = decay S + U^T folded.
    """

    values: Array  # (I + A)^-1 diag(beta) v                [.. C V]
    keys: Array  # (I + A)^-1 diag(beta) (k exp G)          [.. C K]
    queries: Array  # q exp G                               [.. C K]
    scores: Array  # B                                      [.. C C]
    folded: Array  # k exp(G_C - G)                         [.. C K]
    decay: Array  # exp(G_C)                                [.. 1 1 or K]


def chunk_xla(x: Inputs, options: Options) -> tuple[Array, Array]:
    num_tokens, (HV, V, K), H = x.q.shape[0], x.state.shape[1:], x.q.shape[1]
    rows = find_rows(x, options)
    chunks = find_chunks(rows, num_tokens, options.tokens_per_row)
    prepared = _prepare(x, options, chunks)
    start = x.state[rows.read]
    start = jnp.where(rows.keeps_state[:, None, None, None], start, 0)
    start = start.astype(jnp.float32).reshape(-1, H, HV // H, V, K)
    live = chunks.valid.any(axis=-1)

    def body(carry, now):
        state, last = carry
        chunk, row, first, live = now
        state = _select(first, start[row], state)
        new, out = _advance(state, chunk)
        state = _select(live, new, state)
        last = last.at[jnp.where(live, row, rows.live.size)].set(state, mode="drop")
        return (state, last), out

    steps = jax.tree.map(
        lambda y: y.swapaxes(0, 1), (prepared, chunks.row, chunks.first, live)
    )
    carry = start[chunks.row[:, 0]], start
    (_, last), out = lax.scan(body, carry, steps)
    out = out.swapaxes(0, 1)  # [lanes steps H G C V]
    out = jnp.moveaxis(out, -2, 2).reshape(-1, HV, V).astype(options.out_dtype)
    at = jnp.where(chunks.valid, chunks.tokens, num_tokens).ravel()
    all_out = jnp.zeros(x.v.shape, options.out_dtype).at[at].set(out, mode="drop")

    slot = write_slots(x, options, rows, rows.number, rows.length - 1)
    last = last.reshape(-1, HV, V, K).astype(x.state.dtype)
    return x.state.at[slot].set(last, mode="drop"), all_out


def find_chunks(rows: Rows, num_tokens: int, tokens_per_row: int | None) -> Chunks:
    """Chunks of live rows; those of null rows, and what is left over, are not valid."""
    if tokens_per_row is not None:
        steps = -(-tokens_per_row // CHUNK)
        step = jnp.arange(steps, dtype=jnp.int32)[None, :]
        row = jnp.broadcast_to(rows.number[:, None], (rows.number.size, steps))
    else:
        ends = jnp.cumsum(-(-rows.length // CHUNK))
        m = jnp.arange(num_tokens // CHUNK + rows.number.size, dtype=jnp.int32)
        row = jnp.searchsorted(ends, m, side="right").astype(jnp.int32)
        row = jnp.minimum(row, rows.number.size - 1)
        step = (m - ends[row] + -(-rows.length[row] // CHUNK))[None, :]
        row = row[None, :]
    place = step[..., None] * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
    valid = (place < rows.length[row][..., None]) & rows.live[row][..., None]
    tokens = jnp.where(valid, rows.begin[row][..., None] + place, 0)
    return Chunks(row, jnp.broadcast_to(step == 0, row.shape), tokens, valid)


def _prepare(x: Inputs, options: Options, chunks: Chunks) -> Prepared:
    H, HV = x.q.shape[1], x.v.shape[1]

    def take(y: Array) -> Array:
        """[lanes steps H G C ..] of [L heads ..]; zeros where there is no token."""
        taken = _select(chunks.valid, y[chunks.tokens], 0).astype(jnp.float32)
        taken = jnp.moveaxis(taken, 3, 2)  # [lanes steps heads C ..]
        lead = taken.shape[:2]
        return taken.reshape(*lead, H, taken.shape[2] // H, *taken.shape[3:])

    q, k, v = take(x.q), take(x.k), take(x.v)
    if options.qk_l2norm:
        q, k = (y * lax.rsqrt(_dot(y, y) + rule.EPSILON) for y in (q, k))
    q = q * options.scale
    assert isinstance(x.gates, GateLogits)  # chunk_update makes no others
    a, b = (take(y) for y in x.gates.per_token)
    A_log = x.gates.A_log.astype(jnp.float32).reshape(H, HV // H, 1)
    dt_bias = x.gates.dt_bias.astype(jnp.float32)
    dt_bias = dt_bias.reshape(H, HV // H, 1, *dt_bias.shape[1:])
    A_log = A_log if dt_bias.ndim == 3 else A_log[..., None]
    log_decay = rule.log_decay(A_log, a, dt_bias, options.gating)
    # -inf would be NaN where a sum over tokens multiplies it by 0
    log_decay = jnp.maximum(log_decay, rule.NO_DECAY_LEFT)
    beta = rule.beta(b, options.gating)
    valid = chunks.valid[:, :, None, None]
    log_decay, beta = _select(valid, log_decay, 0), _select(valid, beta, 0)
    return _wy(q, k, v, log_decay, beta[..., None])


def _wy(q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> Prepared:
    per_k = log_decay.ndim == k.ndim
    g = log_decay if per_k else log_decay[..., None]
    grown = jnp.exp(jnp.cumsum(g, axis=-2))
    scores = _scores_per_k if per_k else _scores
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    A = jnp.where(jnp.tril(lower, -1), beta * scores(k, k, g), 0)
    # solved for the identity alone: what the triangle meets is multiplied afterwards
    inverse = solve_triangular(
        A,
        jnp.broadcast_to(jnp.eye(CHUNK, dtype=A.dtype), A.shape),
        lower=True,
        unit_diagonal=True,
    )
    return Prepared(
        values=_matmul(inverse, beta * v),
        keys=_matmul(inverse, beta * k * grown),
        queries=q * grown,
        scores=jnp.where(lower, scores(q, k, g), 0),
        folded=k * jnp.exp(_sum_behind(g)),
        decay=grown[..., -1:, :],
    )


# G_i - G_j is always summed from the log-decays between j and i. As a difference of
# running sums it would lose, behind a token that forgets everything (-100 and less),
# the small decays between its followers, and the gradients with them.


def _sum_behind(g: Array) -> Array:
    """The sum of what follows each token, along axis -2."""
    g = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], axis=-2)
    return lax.cumsum(g, axis=g.ndim - 2, reverse=True)


def _scores(x: Array, k: Array, g: Array) -> Array:
    """x_i . k_j exp(G_i - G_j), zero above the diagonal; g [.. C 1]."""
    i, j = jnp.arange(CHUNK)[:, None], jnp.arange(CHUNK)
    from_j = jnp.where(i > j, g, 0)  # [.. m j]
    between = _matmul((i >= j).astype(jnp.float32), from_j)  # [.. i j]
    decay = jnp.exp(jnp.where(i >= j, between, -jnp.inf))
    return _matmul(x, k.swapaxes(-1, -2)) * decay


def _scores_per_k(x: Array, k: Array, g: Array) -> Array:
    """(x_i exp(G_i - G_j)) . k_j. Below the diagonal blocks of 16 the exponent is cut
    at the border r before block I, exp(G_i - G_r) exp(G_r - G_j), both at most 1; in a
    diagonal block it is formed for every pair."""
    blocks = CHUNK // SUBCHUNK

    def cut(y: Array) -> Array:
        return y.reshape(*y.shape[:-2], blocks, SUBCHUNK, y.shape[-1])

    # Left to the products below, the broadcast over a key's heads crashes the gradient
    # on a CPU (jaxlib 0.10.2).
    x, k = jnp.broadcast_to(x, g.shape), jnp.broadcast_to(k, g.shape)
    x, k, g = cut(x), cut(k), cut(g)  # [.. I i K], [.. J j K]
    left = x * jnp.exp(jnp.cumsum(g, axis=-2))
    block = jnp.arange(blocks)
    of_i, of_j = block[:, None, None], block[:, None]
    passed = ((of_j < block) & (block < of_i)).astype(jnp.float32)  # [I J B]
    passed = jnp.einsum("IJB,...BK->...IJK", passed, g.sum(axis=-2))
    behind = passed[..., None, :] + _sum_behind(g)[..., None, :, :, :]  # [.. I J j K]
    behind = jnp.where((of_j < of_i)[..., None], behind, -jnp.inf)
    right = (k[..., None, :, :, :] * jnp.exp(behind)).reshape(
        *behind.shape[:-3], CHUNK, behind.shape[-1]
    )
    below = _matmul(left, right.swapaxes(-1, -2))  # [.. I i C]
    below = below.reshape(*below.shape[:-3], CHUNK, CHUNK)

    i, j = jnp.arange(SUBCHUNK)[:, None, None], jnp.arange(SUBCHUNK)[:, None]
    between = jnp.cumsum(jnp.where(i > j, g[..., :, None, :], 0), axis=-3)
    between = jnp.where(i >= j, between, -jnp.inf)  # [.. I i j K]
    each = x[..., :, None, :] * k[..., None, :, :] * jnp.exp(between)
    inside = each.sum(axis=-1)
    inside = inside.reshape(*inside.shape[:-3], CHUNK, SUBCHUNK)
    block = jnp.arange(CHUNK) // SUBCHUNK
    same = block[:, None] == block
    return below + jnp.where(same, jnp.tile(inside, blocks), 0)


def _advance(state: Array, chunk: Prepared) -> tuple[Array, Array]:
    """(state, out) after one chunk; state [lanes H G V K]."""
    read = state.swapaxes(-1, -2)
    u = chunk.values - _matmul(chunk.keys, read)
    out = _matmul(chunk.queries, read) + _matmul(chunk.scores, u)
    return chunk.decay * state + _matmul(u.swapaxes(-1, -2), chunk.folded), out


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=-1, keepdims=True)


def _select(condition: Array, chosen: Array, other: Array | int) -> Array:
    """`jnp.where` with the condition on the leading axes."""
    extra = chosen.ndim - condition.ndim
    return jnp.where(condition.reshape(condition.shape + (1,) * extra), chosen, other)
