"""A speculative step: the model reads drafts, some stand, and others are drafted.

P   rows of the engine               D   drafts of a step
N   rows of a call, P or fewer       A   tokens of the vocabulary
T   tokens of each
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from gdn_jax.generation.parts import call, emit, put_rows
from gdn_jax.generation.sampling import (
    accept,
    accept_most_likely,
    most_likely,
    position_keys,
    probabilities,
    sample,
)
from gdn_jax.generation.state import Drafts, Emitted, EngineState, Row
from gdn_jax.models.model import Model


def speculative_step(
    model: Model, params: Any, state: EngineState, emitted: Emitted, *, greedy: bool
) -> tuple[EngineState, Emitted]:
    drafts = state.drafts
    assert drafts is not None
    D = drafts.tokens.shape[1]
    fed = jnp.concatenate([state.token[:, None], drafts.tokens], axis=1)
    begin = state.position - 1  # of the first token fed
    hidden, model_state = call(
        model,
        "hidden",
        params,
        fed,
        state.model,
        takes_part=state.is_active,
        num_accepted=state.num_accepted,
    )
    logits = call(model, "logits", params, hidden)
    if greedy:
        num_accepted, token = accept_most_likely(drafts.tokens, logits)
    else:
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
    counted = jnp.where(state.is_active, num_accepted, 0)
    drafts = draft(
        model,
        params,
        drafts,
        hidden,
        texts,
        start=begin,
        num_tokens=counted,
        asked=state.rows,
        rows=None,
        greedy=greedy,
    )
    state = state._replace(
        model=model_state,
        num_accepted=jnp.where(state.is_active, num_accepted, state.num_accepted),
        drafts=drafts,
    )
    return emit(state, emitted, texts, counted, logits)


def draft(
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
    greedy: bool = False,
    reads_only: bool = False,
) -> Drafts:
    """The head reads `num_tokens` of the tokens, then drafts D behind the last.

    greedy: as in `steps.decode`; probabilities are left as they are, which greedy rows
    accept the same drafts by, whatever they are.
    reads_only: nothing is drafted, as amid a prompt, where the next tokens are known.
    """
    D = drafts.tokens.shape[1]
    live = num_tokens > 0
    n = jnp.arange(num_tokens.shape[0], dtype=jnp.int32)
    last = jnp.maximum(num_tokens - 1, 0)
    hidden, cache = call(
        model,
        "draft",
        params,
        next_tokens,
        hidden,
        drafts.cache,
        start=start,
        num_tokens=num_tokens,
        rows=rows,
    )
    if reads_only:
        return drafts._replace(cache=cache)
    hidden = hidden[n, last][:, None]
    places = start + num_tokens + 1  # of the first draft
    tokens, distributions = [], []
    for i in range(D):
        logits = call(model, "logits", params, hidden[:, 0])
        if greedy:
            tokens.append(most_likely(logits))
        else:
            distributions.append(probabilities(logits, asked.options))
            keys = position_keys(asked.seed, places + i)
            tokens.append(sample(keys.draft, distributions[-1]))
        if i + 1 < D:
            hidden, cache = call(
                model,
                "draft",
                params,
                tokens[-1][:, None],
                hidden,
                cache,
                start=start + num_tokens + i,
                num_tokens=live.astype(jnp.int32),
                step=i + 1,
                rows=rows,
            )
    drafts = drafts._replace(
        tokens=put_rows(rows, live, jnp.stack(tokens, axis=1), drafts.tokens),
        cache=cache,
    )
    if greedy:
        return drafts
    new = jnp.stack(distributions, axis=1)
    return drafts._replace(
        probabilities=put_rows(rows, live, new, drafts.probabilities)
    )
