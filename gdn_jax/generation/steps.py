"""What an engine runs on the device: prefill of prompts, blocks of decoding steps.

P   rows of the engine           B   tokens that a block may give a row
N   prompts of a prefill call    D   drafts of a speculative step
T   tokens of each               A   tokens of the vocabulary
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.generation.sampling import (
    Options,
    accept,
    log_probability,
    position_keys,
    probabilities,
    sample,
)
from gdn_jax.generation.state import Drafts, Emitted, EngineState, Row
from gdn_jax.models.model import Model


class Prompts(NamedTuple):
    """Pieces of prompts: each row's next tokens, right-padded to T.

    Attributes:
      rows: [N] int32, the engine's rows, all different.
      tokens: [N, T] int32.
      next_tokens: [N, T] int32, the token behind each; behind a prompt's last: anything.
      num_tokens: [N] int32; 0 for a row that only fills the batch.
      is_first, is_last: [N] bool, whether a prompt begins, ends with the piece.
      asked: what was asked for, [N, ...] in every field.
    """

    rows: Array
    tokens: Array
    next_tokens: Array
    num_tokens: Array
    is_first: Array
    is_last: Array
    asked: Row


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def prefill(
    model: Model, params: Any, state: EngineState, prompts: Prompts
) -> tuple[EngineState, Emitted]:
    """Reads pieces of prompts, and draws the first token of each text (B = 1)."""
    rows, counted = prompts.rows, prompts.num_tokens > 0
    asked = jax.tree.map(
        lambda old, new: old.at[rows].set(_where(counted, new, old[rows])),
        state.rows,
        prompts.asked,
    )
    state = state._replace(rows=asked)
    hidden, model_state = model.apply(
        params,
        prompts.tokens,
        state.model,
        rows=rows,
        num_tokens=prompts.num_tokens,
        has_state=~prompts.is_first,
        method="hidden",
    )
    last = jnp.maximum(prompts.num_tokens - 1, 0)
    position = model_state.length[rows]
    asked = jax.tree.map(lambda x: x[rows], asked)
    n = jnp.arange(rows.shape[0], dtype=jnp.int32)
    logits = model.apply(params, hidden[n, last], method="logits")
    keys = position_keys(asked.seed, position)
    token = sample(keys.next, probabilities(logits, asked.options))

    begins = counted & prompts.is_last
    stops = _is_stop(asked, token[:, None])[:, 0] | (position + 1 >= asked.limit)
    drafts = state.drafts
    if drafts is not None:
        behind = jnp.where(prompts.is_last, token, prompts.next_tokens[n, last])
        drafts = _draft(
            model,
            params,
            drafts,
            hidden,
            prompts.next_tokens.at[n, last].set(behind),
            start=position - prompts.num_tokens,
            num_tokens=prompts.num_tokens,
            asked=asked,
            rows=rows,
        )

    def put(old: Array, new: Array) -> Array:
        return old.at[rows].set(jnp.where(counted, new, old[rows]))

    def spread(values: Array) -> Array:
        """[P, 1], zeros in rows that had no part in the call."""
        return jnp.zeros(state.token.shape, values.dtype).at[rows].set(values)[:, None]

    log_probabilities = log_probability(logits, token)
    nothing = jnp.zeros_like(state.token)
    emitted = Emitted(
        spread(token),
        spread(log_probabilities),
        spread(begins.astype(jnp.int32))[:, 0],
        jnp.int32(0),
        nothing,
        nothing,
    )
    state = EngineState(
        model_state,
        state.rows,
        token=put(state.token, token),
        position=put(state.position, position + 1),
        num_accepted=put(state.num_accepted, jnp.ones_like(token)),
        is_active=put(state.is_active, begins & ~stops),
        drafts=drafts,
    )
    return state, emitted


@functools.partial(
    jax.jit, static_argnames=("model", "steps"), donate_argnames="state"
)
def decode(
    model: Model, params: Any, state: EngineState, steps: int
) -> tuple[EngineState, Emitted]:
    """Up to `steps` steps, fewer once no row is active."""
    P = state.token.shape[0]
    width = 1 if state.drafts is None else 1 + state.drafts.tokens.shape[1]
    step = _plain_step if state.drafts is None else _speculative_step
    nothing = jnp.zeros(P, jnp.int32)
    room = (P, steps * width)
    emitted = Emitted(
        jnp.zeros(room, jnp.int32),
        jnp.zeros(room, jnp.float32),
        nothing,
        jnp.int32(0),
        nothing,
        nothing,
    )

    def goes_on(carry):
        state, emitted = carry
        return (emitted.steps < steps) & jnp.any(state.is_active)

    def body(carry):
        return step(model, params, *carry)

    return lax.while_loop(goes_on, body, (state, emitted))


def _plain_step(
    model: Model, params: Any, state: EngineState, emitted: Emitted
) -> tuple[EngineState, Emitted]:
    active = state.is_active.astype(jnp.int32)
    logits, model_state = model.apply(
        params, state.token[:, None], state.model, num_tokens=active
    )
    keys = position_keys(state.rows.seed, state.position)
    token = sample(keys.next, probabilities(logits[:, 0], state.rows.options))
    state, emitted = _emit(state, emitted, token[:, None], active, logits)
    return state._replace(model=model_state), emitted


def _speculative_step(
    model: Model, params: Any, state: EngineState, emitted: Emitted
) -> tuple[EngineState, Emitted]:
    drafts = state.drafts
    D = drafts.tokens.shape[1]
    fed = jnp.concatenate([state.token[:, None], drafts.tokens], axis=1)
    begin = state.position - 1  # of the first token fed
    hidden, model_state = model.apply(
        params,
        fed,
        state.model,
        num_tokens=jnp.where(state.is_active, D + 1, 0),
        num_accepted=state.num_accepted,
        method="hidden",
    )
    logits = model.apply(params, hidden, method="logits")
    places = state.position[:, None] + jnp.arange(D + 1, dtype=jnp.int32)
    num_accepted, token = accept(
        position_keys(state.rows.seed, places),
        drafts.tokens,
        drafts.probabilities,
        probabilities(logits, state.rows.options),
    )
    # What stands: the drafts accepted, then the new token in its place behind them.
    columns = jnp.arange(D + 1, dtype=jnp.int32)
    texts = jnp.where(
        columns == num_accepted[:, None] - 1,
        token[:, None],
        jnp.pad(drafts.tokens, ((0, 0), (0, 1))),
    )
    drafts = _draft(
        model,
        params,
        drafts,
        hidden,
        texts,
        start=begin,
        num_tokens=jnp.where(state.is_active, num_accepted, 0),
        asked=state.rows,
        rows=None,
    )
    counted = jnp.where(state.is_active, num_accepted, 0)
    kept = jnp.where(state.is_active, num_accepted, state.num_accepted)
    state, emitted = _emit(state, emitted, texts, counted, logits)
    return (
        state._replace(model=model_state, num_accepted=kept, drafts=drafts),
        emitted,
    )


def _draft(
    model: Model,
    params: Any,
    drafts: Drafts,
    hidden: Array,
    next_tokens: Array,
    *,
    start: Array,
    num_tokens: Array,
    asked: Row,
    rows: Array | None,
) -> Drafts:
    """The head reads `num_tokens` of the tokens, then drafts D behind the last."""
    D = drafts.tokens.shape[1]
    live = num_tokens > 0
    n = jnp.arange(num_tokens.shape[0], dtype=jnp.int32)
    last = jnp.maximum(num_tokens - 1, 0)
    where = dict(rows=rows, method="draft")
    hidden, cache = model.apply(
        params,
        next_tokens,
        hidden,
        drafts.cache,
        start=start,
        num_tokens=num_tokens,
        **where,
    )
    hidden = hidden[n, last][:, None]
    places = start + num_tokens + 1  # of the first draft
    tokens, distributions = [], []
    for i in range(D):
        logits = model.apply(params, hidden[:, 0], method="logits")
        distribution = probabilities(logits, asked.options)
        keys = position_keys(asked.seed, places + i)
        tokens.append(sample(keys.draft, distribution))
        distributions.append(distribution)
        if i + 1 < D:
            hidden, cache = model.apply(
                params,
                tokens[-1][:, None],
                hidden,
                cache,
                start=start + num_tokens + i,
                num_tokens=live.astype(jnp.int32),
                step=i + 1,
                **where,
            )
    new = jnp.stack(tokens, axis=1), jnp.stack(distributions, axis=1)
    old = drafts.tokens, drafts.probabilities
    if rows is None:
        return Drafts(*(_where(live, x, y) for x, y in zip(new, old, strict=True)), cache)
    put = (
        y.at[rows].set(_where(live, x, y[rows])) for x, y in zip(new, old, strict=True)
    )
    return Drafts(*put, cache)


def _emit(
    state: EngineState, emitted: Emitted, texts: Array, counted: Array, logits: Array
) -> tuple[EngineState, Emitted]:
    """Takes each row's first `counted` of `texts` [P, S], up to its end."""
    columns = jnp.arange(texts.shape[1], dtype=jnp.int32)
    room = state.rows.limit - state.position
    stops = _is_stop(state.rows, texts) & (columns < counted[:, None])
    to_stop = jnp.where(jnp.any(stops, 1), jnp.argmax(stops, 1).astype(jnp.int32) + 1, counted)
    taken = jnp.minimum(jnp.minimum(counted, room), to_stop)
    ends = (taken >= room) | (jnp.any(stops, 1) & (taken == to_stop))
    is_taken = columns < taken[:, None]
    places = jnp.where(is_taken, emitted.count[:, None] + columns, emitted.tokens.shape[1])
    rows = jnp.arange(texts.shape[0], dtype=jnp.int32)[:, None]
    log_probabilities = log_probability(logits, texts)
    is_whole = state.is_active & (taken == counted)
    emitted = Emitted(
        emitted.tokens.at[rows, places].set(texts, mode="drop"),
        emitted.log_probabilities.at[rows, places].set(log_probabilities, mode="drop"),
        emitted.count + taken,
        emitted.steps + 1,
        emitted.accepted + jnp.where(is_whole, taken, 0),
        emitted.row_steps + is_whole,
    )
    last = jnp.take_along_axis(texts, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
    state = state._replace(
        token=jnp.where(taken > 0, last, state.token),
        position=state.position + taken,
        is_active=state.is_active & ~ends,
    )
    return state, emitted


def _is_stop(rows: Row, tokens: Array) -> Array:
    """[P, S], whether each of tokens [P, S] ends its row's text."""
    return jnp.any(tokens[..., None] == rows.stop[:, None], axis=-1)


def _where(row: Array, new: Array, old: Array) -> Array:
    """A select by rows, of any rank; typed keys too."""
    return jnp.where(row.reshape(-1, *[1] * (new.ndim - 1)), new, old)


@functools.partial(jax.jit, donate_argnames="state")
def stop_rows(state: EngineState, rows: Array) -> EngineState:
    """Ends the texts of `rows` [P] bool where they are."""
    return state._replace(is_active=state.is_active & ~rows)
