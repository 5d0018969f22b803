"""What steps are made of: calls of the model, rows of a state, tokens taken."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.generation.sampling import log_probability
from gdn_jax.generation.state import Emitted, EngineState, Row
from gdn_jax.models.model import Model


def call(model: Model, method: str, params: Any, *args: Any, **keywords: Any) -> Any:
    """A method of the model; Flax's own type of it says little."""
    return model.apply(params, *args, method=method, **keywords)


def init_emitted(num_rows: int, room: int) -> Emitted:
    """No tokens yet, with room for so many a row."""
    nothing = jnp.zeros(num_rows, jnp.int32)
    return Emitted(
        jnp.zeros((num_rows, room), jnp.int32),
        jnp.zeros((num_rows, room), jnp.float32),
        nothing,
        jnp.int32(0),
        nothing,
        nothing,
    )


def emit(
    state: EngineState, emitted: Emitted, texts: Array, counted: Array, logits: Array
) -> tuple[EngineState, Emitted]:
    """Takes each row's first `counted` of `texts` [P, S], up to its end."""
    columns = jnp.arange(texts.shape[1], dtype=jnp.int32)
    room = state.rows.limit - state.position
    stops = is_stop(state.rows, texts) & (columns < counted[:, None])
    has_stop = jnp.any(stops, axis=1)
    first_stop = jnp.argmax(stops, axis=1).astype(jnp.int32)
    to_stop = jnp.where(has_stop, first_stop + 1, counted)
    taken = jnp.minimum(to_stop, room)
    ends = (taken >= room) | has_stop
    is_whole = state.is_active & (taken == counted)

    rows = jnp.arange(texts.shape[0], dtype=jnp.int32)[:, None]
    places = emitted.num_tokens[:, None] + columns
    places = jnp.where(columns < taken[:, None], places, emitted.tokens.shape[1])
    log_probabilities = log_probability(logits, texts)
    emitted = Emitted(
        emitted.tokens.at[rows, places].set(texts, mode="drop"),
        emitted.log_probabilities.at[rows, places].set(log_probabilities, mode="drop"),
        emitted.num_tokens + taken,
        emitted.steps + jnp.any(state.is_active),
        emitted.accepted + jnp.where(is_whole, taken, 0),
        emitted.row_steps + is_whole,
    )
    last = texts[rows[:, 0], jnp.maximum(taken - 1, 0)]
    state = state._replace(
        token=jnp.where(taken > 0, last, state.token),
        position=state.position + taken,
        is_active=state.is_active & ~ends,
    )
    return state, emitted


def is_stop(rows: Row, tokens: Array) -> Array:
    """[P, S], whether each of tokens [P, S] ends its row's text."""
    return jnp.any(tokens[..., None] == rows.stop[:, None], axis=-1)


def put_rows(rows: Array | None, live: Array, new: Any, old: Any) -> Any:
    """The tree `old`, [P, ...] in each leaf, with live ones of `new` at rows [N].

    rows: None, row n is row n, of all.
    """

    def put(new: Array, old: Array) -> Array:
        here = old if rows is None else old[rows]
        taken = jnp.where(live.reshape(-1, *[1] * (new.ndim - 1)), new, here)
        return taken if rows is None else old.at[rows].set(taken)

    return jax.tree.map(put, new, old)
