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

from gdn_jax.generation.parts import call, emit, init_emitted, is_stop, put_rows
from gdn_jax.generation.sampling import (
    log_probability,
    most_likely,
    position_keys,
    probabilities,
    sample,
)
from gdn_jax.generation.shared import Jitted, on_every_device
from gdn_jax.generation.speculative import draft, speculative_step
from gdn_jax.generation.state import Emitted, EngineState, Row
from gdn_jax.models.model import Model


class Prompts(NamedTuple):
    """Pieces of prompts: each row's next tokens, right-padded to T.

    Attributes:
      rows: [N] int32, the engine's rows, all different.
      tokens: [N, T] int32.
      next_tokens: [N, T] int32, the token behind each; behind a prompt's
        last: anything.
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


@functools.partial(
    jax.jit, static_argnames=("model", "drafting"), donate_argnames="state"
)
@on_every_device
def prefill(
    model: Model,
    params: Any,
    state: EngineState,
    prompts: Prompts,
    drafting: bool = True,
) -> tuple[EngineState, Emitted]:
    """Reads pieces of prompts, and draws the first token of each text (B = 1).

    drafting: whether drafts are made behind the texts' first tokens, if the engine has
    any: in vain where no piece is its prompt's last.
    """
    rows, counted = prompts.rows, prompts.num_tokens > 0
    state = state._replace(rows=put_rows(rows, counted, prompts.asked, state.rows))
    hidden, model_state = call(
        model,
        "hidden",
        params,
        prompts.tokens,
        state.model,
        rows=rows,
        num_tokens=prompts.num_tokens,
        has_state=~prompts.is_first,
    )
    n = jnp.arange(rows.shape[0], dtype=jnp.int32)
    last = jnp.maximum(prompts.num_tokens - 1, 0)
    position = model_state.length[rows]
    asked = jax.tree.map(lambda x: x[rows], state.rows)
    logits = call(model, "logits", params, hidden[n, last])
    keys = position_keys(asked.seed, position)
    token = sample(keys.next, probabilities(logits, asked.options))

    begins = counted & prompts.is_last
    ends = is_stop(asked, token[:, None])[:, 0] | (position + 1 >= asked.limit)
    drafts = state.drafts
    if drafts is not None:
        behind = jnp.where(prompts.is_last, token, prompts.next_tokens[n, last])
        drafts = draft(
            model,
            params,
            drafts,
            hidden,
            prompts.next_tokens.at[n, last].set(behind),
            start=position - prompts.num_tokens,
            num_tokens=prompts.num_tokens,
            asked=asked,
            rows=rows,
            reads_only=not drafting,
        )

    new = token, position + 1, jnp.ones_like(token), begins & ~ends
    old = state.token, state.position, state.num_accepted, state.is_active
    token_of, position_of, accepted, is_active = put_rows(rows, counted, new, old)
    state = EngineState(
        model_state, state.rows, token_of, position_of, accepted, is_active, drafts
    )
    emitted = init_emitted(state.token.shape[0], 1)
    emitted = emitted._replace(
        tokens=emitted.tokens.at[rows, 0].set(token),
        log_probabilities=emitted.log_probabilities.at[rows, 0].set(
            log_probability(logits, token)
        ),
        num_tokens=emitted.num_tokens.at[rows].set(begins.astype(jnp.int32)),
    )
    return state, emitted


@functools.partial(
    Jitted, static_argnames=("model", "steps", "greedy"), donate_argnames="state"
)
@on_every_device
def decode(
    model: Model, params: Any, state: EngineState, steps: int, greedy: bool = False
) -> tuple[EngineState, Emitted]:
    """Up to `steps` steps, few more than it takes until no row is active.

    greedy: that every active row's temperature is 0. The tokens are the same, but that
    distributions over the whole vocabulary are not made, which costs more than some
    layers, and that no step waits for its host to learn which options are in use.
    """
    step, width = _plain_step, 1
    if state.drafts is not None:
        step, width = speculative_step, 1 + state.drafts.tokens.shape[1]
    emitted = init_emitted(state.token.shape[0], steps * width)

    # On a GPU the host learns of every step that it may launch the next one, during
    # which nothing runs: so only of every few.
    stride = next(n for n in (4, 3, 2, 1) if steps % n == 0)

    def goes_on(carry):
        state, emitted = carry
        return (emitted.steps < steps) & jnp.any(state.is_active)

    def body(carry):
        return lax.fori_loop(
            0, stride, lambda _, x: step(model, params, *x, greedy=greedy), carry
        )

    return lax.while_loop(goes_on, body, (state, emitted))


def _plain_step(
    model: Model, params: Any, state: EngineState, emitted: Emitted, *, greedy: bool
) -> tuple[EngineState, Emitted]:
    active = state.is_active
    logits, model_state = call(
        model, "__call__", params, state.token[:, None], state.model, takes_part=active
    )
    if greedy:
        token = most_likely(logits[:, 0])
    else:
        keys = position_keys(state.rows.seed, state.position)
        token = sample(keys.next, probabilities(logits[:, 0], state.rows.options))
    counted = active.astype(jnp.int32)
    state, emitted = emit(state, emitted, token[:, None], counted, logits)
    return state._replace(model=model_state), emitted


@functools.partial(jax.jit, donate_argnames="state")
def stop_rows(state: EngineState, rows: Array) -> EngineState:
    """Ends the texts of `rows` [P] bool where they are."""
    return state._replace(is_active=state.is_active & ~rows)
