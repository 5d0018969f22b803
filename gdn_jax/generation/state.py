"""What an engine carries on the device: a value that can be looked at and kept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.generation.sampling import Options
from gdn_jax.generation.shared import own_part
from gdn_jax.generation.sizes import Sizes
from gdn_jax.models.model import Model
from gdn_jax.models.sharded import AnyModel, ShardedModel
from gdn_jax.models.state import ModelState
from gdn_jax.nn.attention import KVCache


class Drafts(NamedTuple):
    """The tokens that the next speculative step tries, D a row.

    Attributes:
      tokens: [P, D] int32.
      probabilities: [P, D, A] float32, what they were drawn from.
      cache: of the multi-token prediction head.
    """

    tokens: Array
    probabilities: Array
    cache: tuple[KVCache, ...]


class Row(NamedTuple):
    """A request's part of the state; every field [P, ...], a row a request.

    Attributes:
      seed: typed PRNG keys; the token at a position is drawn with `position_keys`.
      options: how tokens are chosen.
      stop: [P, E] int32, tokens that end the text; -1 for none.
      limit: int32, the position (tokens of prompt and text) at which the text ends.
    """

    seed: Array
    options: Options
    stop: Array
    limit: Array


class EngineState(NamedTuple):
    """P rows, each empty or with a request.

    Attributes:
      model: the model's state.
      rows: what was asked for.
      token: [P] int32, each row's last token, which the model has not seen yet.
      position: [P] int32, tokens of prompt and text, that one included.
      num_accepted: [P] int32, tokens of the last speculative step that stand.
      is_active: [P] bool, whether a row's text goes on.
      drafts: None without speculative decoding.
    """

    model: ModelState
    rows: Row
    token: Array
    position: Array
    num_accepted: Array
    is_active: Array
    drafts: Drafts | None


class Emitted(NamedTuple):
    """Tokens that one call gave, each row's first `num_tokens` of its columns.

    Attributes:
      tokens: [P, B] int32.
      log_probabilities: [P, B] float32, the model's own, whatever the options.
      num_tokens: [P] int32.
      steps: int32, steps that the model took.
      accepted: [P] int32, tokens that those of a row's steps which ran whole gave.
      row_steps: [P] int32, how many such steps there were.
    """

    tokens: Array
    log_probabilities: Array
    num_tokens: Array
    steps: Array
    accepted: Array
    row_steps: Array


def init_state(model: AnyModel, sizes: Sizes) -> EngineState:
    """Of empty rows; on a mesh every device makes its own part."""
    part, own = own_part(model, sizes)
    if isinstance(model, ShardedModel):
        return model.make(lambda _: _init_state(part, own), sizes.num_rows)
    return _init_state(model, sizes)


def _init_state(model: Model, sizes: Sizes) -> EngineState:
    drafts = sizes.speculative

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros((sizes.num_rows, *shape), dtype)

    kept = None
    if drafts:
        kept = Drafts(
            zeros(drafts),
            zeros(drafts, model.config.vocab_size, dtype=jnp.float32),
            model.init_draft_cache(sizes.num_rows, sizes.num_positions),
        )
    options = Options(zeros(dtype=jnp.float32), zeros(dtype=jnp.float32) + 1, zeros())
    seed = jax.random.split(jax.random.key(0, impl="threefry2x32"), sizes.num_rows)
    return EngineState(
        model.init_state(
            sizes.num_rows,
            sizes.num_positions,
            drafts=drafts,
            recurrent_dtype=sizes.recurrent_dtype,
            decode=sizes.decode,
        ),
        Row(seed, options, zeros(sizes.max_stop) - 1, zeros()),
        token=zeros(),
        position=zeros(),
        num_accepted=zeros() + 1,
        is_active=zeros(dtype=bool),
        drafts=kept,
    )


def state_bytes(model: AnyModel, sizes: Sizes) -> int:
    """How large `init_state` is on a device, which it is not asked to make."""
    part, own = own_part(model, sizes)
    state = jax.eval_shape(lambda: _init_state(part, own))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
