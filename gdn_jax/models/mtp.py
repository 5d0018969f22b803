"""The multi-token prediction head, which drafts for speculative decoding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gdn_jax.models.config import Config
from gdn_jax.models.layers import DecoderLayer, Stream
from gdn_jax.models.state import Tokens
from gdn_jax.nn.attention import KVCache
from gdn_jax.nn.norm import RMSNorm
from gdn_jax.nn.projections import Matrices
from gdn_jax.nn.split import Split


class MultiTokenPrediction(nn.Module):
    """norm(layer(fc [norm(embedding of the next token) | norm(hidden)])).

    Its layers are attention layers; with n of them, draft i is made by layer i % n.
    As vLLM runs Qwen's checkpoints, and transformers 5.23's MtpModel.

    Attributes: as in `Model`.
    """

    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None
    split: Split | None = None

    def setup(self):
        config = self.config
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm: dict[str, Any] = dict(
            size=config.hidden_size, eps=config.rms_norm_eps, **dtypes
        )
        self.embedding_norm = RMSNorm(**norm)
        self.hidden_norm = RMSNorm(**norm)
        matrices = Matrices(self.dtype, self.param_dtype, nn.initializers.normal(0.02))
        self.fc = matrices.dense(config.hidden_size, None, "embed")
        self.layers = [
            DecoderLayer(
                config,
                "full_attention",
                config.is_sparse(i),
                implementation=self.implementation,
                split=self.split,
                **dtypes,
            )
            for i in range(config.num_mtp_layers)
        ]
        self.norm = RMSNorm(**norm)

    def __call__(
        self,
        embedded: Array,
        hidden: Array,
        cache: tuple[KVCache, ...] | None = None,
        *,
        start: Array | None = None,
        rows: Array | None = None,
        num_tokens: Array | None = None,
        step: int = 0,
    ) -> tuple[Array, tuple[KVCache, ...] | None]:
        """See `Model.draft`."""
        parts = self.embedding_norm(embedded), self.hidden_norm(hidden)
        x = self.fc(jnp.concatenate(parts, axis=-1), self.implementation)
        call = Tokens((x.shape[0], x.shape[1]), rows, num_tokens, start)
        number = step % len(self.layers)
        if self.is_initializing():
            for layer in self.layers:
                layer(Stream(x, None), None, call)
        own = None if cache is None else cache[number]
        stream, new = self.layers[number](Stream(x, None), own, call)
        if cache is not None:
            cache = (*cache[:number], new, *cache[number + 1 :])
        return stream.add(self.norm, self.implementation)[1], cache
