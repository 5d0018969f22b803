"""The text model of Qwen3-Next and Qwen3.5."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax.models.config import Config
from gdn_jax.models.layers import (
    DecoderLayer,
    Stream,
    init_layer_state,
    make_mixer,
)
from gdn_jax.models.mtp import MultiTokenPrediction
from gdn_jax.models.shares import own_config
from gdn_jax.models.state import ModelState, find_tokens, new_length
from gdn_jax.nn.attention import KVCache
from gdn_jax.nn.norm import RMSNorm
from gdn_jax.nn.split import Split
from gdn_jax.ops import checks


class Model(nn.Module):
    """Embedding, layers of Gated DeltaNet or attention, each with its MLP, and a head.

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import models
        >>> model, params = models.load(models.SMALL, progress=False)
        >>> apply = jax.jit(model.apply)
        >>> tokens = jnp.array([[100, 101, 102]])
        >>> logits = apply({"params": params}, tokens)               # training
        >>> state = model.init_state(num_rows=1, num_positions=64)
        >>> logits, state = apply({"params": params}, tokens, state)   # goes on
        >>> logits, state = apply({"params": params}, tokens[:, :1], state)

    `load` makes both from a checkpoint. As transformers 5.23's Qwen3NextForCausalLM,
    Qwen3_5ForCausalLM and Qwen3_5MoeForCausalLM.

    Attributes:
      config: what is built.
      dtype: of activations, caches and the convolutions' states.
      param_dtype: of parameters (A_log and dt_bias are float32).
      implementation: of the ops, as in `fused_update`.
      split: given inside of `shard_map` alone, see `ShardedModel`: this is the part of
        the model that a device has.
    """

    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None
    split: Split | None = None

    def setup(self):
        config = self.own_config
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        parts: dict[str, Any] = dict(
            implementation=self.implementation, split=self.split, **dtypes
        )
        init = nn.initializers.normal(0.02)
        vocab_size = config.vocab_size
        if self.split is not None and self.split.vocab:
            vocab_size //= self.split.parts
        self.embed = nn.Embed(
            vocab_size,
            config.hidden_size,
            embedding_init=nn.with_logical_partitioning(init, ("vocab", "embed")),
            **dtypes,
        )
        self.layers = [
            DecoderLayer(config, kind, config.is_sparse(i), **parts)
            for i, kind in enumerate(config.layer_types)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **dtypes)
        if not config.tie_word_embeddings:
            self.head = nn.Dense(
                vocab_size,
                use_bias=False,
                kernel_init=nn.with_logical_partitioning(init, ("embed", "vocab")),
                **dtypes,
            )
        if config.num_mtp_layers:
            self.mtp = MultiTokenPrediction(config, **parts)

    @property
    def own_config(self) -> Config:
        """Of the heads and columns that there are here."""
        return (
            self.config if self.split is None else own_config(self.config, self.split)
        )

    def __call__(
        self,
        tokens: ArrayLike,
        state: ModelState | None = None,
        *,
        rows: ArrayLike | None = None,
        num_tokens: ArrayLike | None = None,
        has_state: ArrayLike | None = None,
        num_accepted: ArrayLike | None = None,
        takes_part: ArrayLike | None = None,
    ) -> Any:
        """Logits of each next token.

        Args:
          tokens: [N, T] integers. Those outside the vocabulary are taken as its ends.
          state: from `init_state` or the last call; donated under `jax.jit` it is
            updated in place. None: each row is a whole sequence. A model with attention
            keeps num_positions tokens of a sequence: it is for the caller to count, as
            the logits of those that come after them are wrong.
          rows: [N] int32, which of the state's sequences each row is, all different;
            which is checked of NumPy's alone, since a device's would be waited for.
            None: row n is sequence n, of all.
          num_tokens: [N] int32, how many of the T tokens count, the first ones; 0
            leaves a sequence as it is. None: all. The others' logits mean nothing.
          has_state: [N] bool; False begins a sequence, whatever the state holds.
          num_accepted: [N] int32, for a speculative step: how many tokens of the
            sequence's last speculative step stand (1 after any other call), as in
            `fused_update`. The call's own tokens, at most 1 + drafts, wait for the next
            call's `num_accepted` to say how many stand.
          takes_part: [N] bool, instead of num_tokens where all the T tokens count or
            none, which is faster.

        Returns:
          logits [N, T, vocab_size] in `dtype`, and with a state (logits, state).

        Raises:
          ValueError: the call is wrong; the text names the argument and the remedy.
        """
        hidden, new_state = self.hidden(
            tokens,
            state,
            rows=rows,
            num_tokens=num_tokens,
            has_state=has_state,
            num_accepted=num_accepted,
            takes_part=takes_part,
        )
        if self.is_initializing() and self.config.num_mtp_layers:
            self.mtp(self._embedded(jnp.asarray(tokens)), hidden)
        logits = self.logits(hidden)
        return logits if state is None else (logits, new_state)

    def hidden(
        self,
        tokens: ArrayLike,
        state: ModelState | None = None,
        *,
        rows: ArrayLike | None = None,
        num_tokens: ArrayLike | None = None,
        has_state: ArrayLike | None = None,
        num_accepted: ArrayLike | None = None,
        takes_part: ArrayLike | None = None,
    ) -> tuple[Array, ModelState | None]:
        """As the call, but what `logits` takes, [N, T, D], behind the last norm."""
        tokens = checks.integers("tokens", tokens)
        call = find_tokens(
            tokens.shape, state, rows, num_tokens, has_state, num_accepted, takes_part
        )
        stream = Stream(self._embedded(tokens), None)
        layers: list[Any] = [None] * len(self.layers)
        if state is not None:
            layers = list(state.layers)
        for i, layer in enumerate(self.layers):
            stream, layers[i] = layer(stream, layers[i], call)
        if state is not None:
            state = ModelState(tuple(layers), new_length(state, call))
        return stream.add(self.norm, self.implementation)[1], state

    def logits(self, hidden: Array) -> Array:
        """[..., vocab_size] of [..., D]."""
        tied = self.config.tie_word_embeddings
        logits = self.embed.attend(hidden) if tied else self.head(hidden)
        if self.split is not None and self.split.vocab:
            return self.split.gathered(logits)
        return logits

    def draft(
        self,
        next_tokens: ArrayLike,
        hidden: Array,
        cache: tuple[KVCache, ...] | None = None,
        *,
        start: Array | None = None,
        rows: Array | None = None,
        num_tokens: Array | None = None,
        step: int = 0,
    ) -> tuple[Array, tuple[KVCache, ...] | None]:
        """One step of the multi-token prediction head: (hidden, cache).

        Args:
          next_tokens: [N, T] integers, the token behind each of `hidden`'s.
          hidden: [N, T, D], of `hidden` above, or what this gave for the draft before.
          cache: from `init_draft_cache` or the last call. None: whole sequences.
          start: [N], the position of `hidden`'s first token.
          rows, num_tokens: as in the call.
          step: which draft this is; layer step % n of the head's n makes it.

        Returns:
          hidden: [N, T, D]; `logits` of it are those of the token behind `next_tokens`.
          cache: moved on.
        """
        if not self.config.num_mtp_layers:
            remedy = "This model has no multi-token prediction head."
            checks.fail("config.num_mtp_layers", 0, ">= 1", remedy)
        return self.mtp(
            self._embedded(checks.integers("next_tokens", next_tokens)),
            hidden,
            cache,
            start=start,
            rows=rows,
            num_tokens=num_tokens,
            step=step,
        )

    def _embedded(self, tokens: Array) -> Array:
        """Rows of the table in its own dtype, cast afterwards: so gradients are added
        up in that dtype, which in bfloat16, where many tokens are the same, costs a
        GPU far more than all the rest."""
        table = self.embed.embedding
        if self.split is not None and self.split.vocab:
            return self.split.embedded(table, tokens).astype(self.dtype)
        return jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)

    @nn.nowrap
    def init_state(
        self,
        num_rows: int,
        num_positions: int,
        *,
        drafts: int = 0,
        recurrent_dtype: Any = jnp.float32,
        decode: str | None = None,
    ) -> ModelState:
        """An empty state.

        Args:
          num_rows: P, sequences.
          num_positions: M, tokens of the longest, drafts included.
          drafts: most drafts of a speculative step.
          recurrent_dtype, decode: of the rule's states; see
            `GatedDeltaNet.init_state`.

        Raises:
          ValueError: a size is wrong.
        """
        checks.count("num_rows", num_rows, "It is a count of sequences.")
        checks.count("num_positions", num_positions, "It is a count of tokens.")
        if drafts < 0:
            checks.fail("drafts", drafts, ">= 0", "It is a count of drafts.")
        kinds = self.config.layer_types
        layers = (
            init_layer_state(
                make_mixer(self.own_config, kind, self.dtype, self.param_dtype),
                num_rows,
                num_positions,
                1 + drafts,
                recurrent_dtype,
                decode,
            )
            for kind in kinds
        )
        return ModelState(tuple(layers), jnp.zeros(num_rows, jnp.int32))

    @nn.nowrap
    def init_draft_cache(
        self, num_rows: int, num_positions: int
    ) -> tuple[KVCache, ...]:
        """An empty cache of the multi-token prediction head."""
        config = self.own_config
        mixer = make_mixer(config, "full_attention", self.dtype, self.param_dtype)
        return tuple(
            mixer.init_cache(num_rows, num_positions)
            for _ in range(self.config.num_mtp_layers)
        )
