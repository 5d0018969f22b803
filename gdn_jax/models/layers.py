"""A decoder layer, and how each kind of mixer is called."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gdn_jax.models.config import Config
from gdn_jax.models.state import LayerState, Tokens
from gdn_jax.nn.attention import GatedAttention
from gdn_jax.nn.gated_delta_net import GatedDeltaNet
from gdn_jax.nn.mlp import GatedMLP
from gdn_jax.nn.moe import MixtureOfExperts
from gdn_jax.nn.norm import RMSNorm
from gdn_jax.nn.split import Split, summed
from gdn_jax.nn.state import GatedDeltaNetState


class Stream(NamedTuple):
    """A residual stream whose last addition is made with the next norm.

    Attributes:
      x: [N, T, D].
      parts: [S, N, T, D], whose sum is to be added; None: nothing is.
    """

    x: Array
    parts: Array | None

    def add(self, norm: RMSNorm, implementation: str | None) -> tuple[Array, Array]:
        """(x, norm(x)), the addition made."""
        if self.parts is None:
            return self.x, norm(self.x)
        return norm.add(self.x, self.parts, implementation)


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Attributes:
      config: the model's; of a part of it, the part's.
      mixer_type: an entry of `config.layer_types`.
      is_sparse: whether the MLP is a mixture of experts.
      dtype, param_dtype: of activations and of parameters.
      implementation: of the ops, as in `fused_update`.
      split: as in `Model`.
    """

    config: Config
    mixer_type: str
    is_sparse: bool
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
        self.mixer_norm = RMSNorm(**norm)
        self.mlp_norm = RMSNorm(**norm)
        self.mixer = make_mixer(config, self.mixer_type, **dtypes)
        self.mlp = make_mlp(
            config, self.is_sparse, self.implementation, self.split, **dtypes
        )

    def __call__(
        self, stream: Stream, state: LayerState | None, tokens: Tokens
    ) -> tuple[Stream, Any]:
        x, y = stream.add(self.mixer_norm, self.implementation)
        parts, state = self.mix(y, state, tokens)
        parts = summed(parts, self.split, self.dtype)
        x, y = Stream(x, parts).add(self.mlp_norm, self.implementation)
        if self.is_sparse:
            parts = self.mlp(y, live=tokens.live)[None]
        else:
            parts = self.mlp.parts(y, self.implementation)
        return Stream(x, summed(parts, self.split, self.dtype)), state

    def mix(self, x: Array, state: Any, tokens: Tokens) -> tuple[Array, Any]:
        """The mixer's parts [S, N, T, D], and its state."""
        if self.mixer_type == "full_attention":
            return self.mixer.parts(
                x,
                state,
                start=tokens.start,
                rows=tokens.rows,
                num_tokens=tokens.num_tokens,
                implementation=self.implementation,
            )
        if state is None:
            return self.mixer.parts(x, implementation=self.implementation)[0], None
        x, keywords = as_rows(x, state, tokens)
        parts, state = self.mixer.parts(
            x, state, implementation=self.implementation, **keywords
        )
        return parts.reshape(-1, *tokens.lead, x.shape[-1]), state


def make_mixer(
    config: Config, mixer_type: str, dtype: Any, param_dtype: Any
) -> nn.Module:
    if mixer_type == "full_attention":
        return GatedAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rotary_dim,
            rope_theta=config.rope_theta,
            norm_eps=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    return GatedDeltaNet(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        layout="interleaved" if config.model_type == "qwen3_next" else "flat",
        norm_eps=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def make_mlp(
    config: Config,
    is_sparse: bool,
    implementation: str | None,
    split: Split | None,
    dtype: Any,
    param_dtype: Any,
) -> nn.Module:
    dtypes = dict(dtype=dtype, param_dtype=param_dtype)
    if not is_sparse:
        return GatedMLP(config.hidden_size, config.intermediate_size, **dtypes)
    return MixtureOfExperts(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        norm_topk=config.norm_topk_prob,
        implementation=implementation,
        split=split,
        **dtypes,
    )


def init_layer_state(
    mixer: nn.Module,
    num_rows: int,
    num_positions: int,
    columns: int,
    recurrent_dtype: Any,
    decode: str | None,
) -> LayerState:
    if isinstance(mixer, GatedAttention):
        return mixer.init_cache(num_rows, num_positions)
    return mixer.init_state(
        num_rows if decode == "replay" else num_rows * columns,
        columns=columns,
        num_conv_slots=num_rows,
        recurrent_dtype=recurrent_dtype,
        decode=decode,
    )


def as_rows(
    x: Array, state: GatedDeltaNetState, tokens: Tokens
) -> tuple[Array, dict[str, Array | None]]:
    """x and the keywords of a GatedDeltaNet's call.

    Where rows have some tokens that do not count, x is packed and these are rows of
    their own, in no slot: two rows for each sequence.
    """
    N, T = tokens.lead
    columns = state.slots_each
    has_state, num_accepted = tokens.has_state, tokens.num_accepted
    if tokens.rows is None and tokens.num_tokens is None and columns == 1:
        accepted = dict(num_accepted=num_accepted) if state.is_replay else {}
        return x, dict(has_state=has_state) | accepted
    rows = tokens.find_rows()
    slots = rows * columns
    if num_accepted is not None and not state.is_replay:
        slots = slots[:, None] + jnp.arange(columns, dtype=jnp.int32)
    tables = dict(
        slots=slots, conv_slots=rows, has_state=has_state, num_accepted=num_accepted
    )
    if tokens.num_tokens is None:
        return x, tables
    counted = tokens.num_tokens
    if T == 1 or tokens.takes_part is not None:
        is_live = counted > 0
        live = is_live if slots.ndim == 1 else is_live[:, None]
        return x, tables | dict(
            slots=jnp.where(live, slots, -1), conv_slots=jnp.where(is_live, rows, -1)
        )
    begins = jnp.arange(N, dtype=jnp.int32) * T
    ends = jnp.stack([begins, begins + counted], axis=1).reshape(-1)
    cu_seqlens = jnp.append(ends, jnp.int32(N * T))
    nowhere = dict(slots=-1, conv_slots=-1, has_state=False, num_accepted=1)
    tables = {
        name: None if table is None else _with_padding(table, nowhere[name])
        for name, table in tables.items()
    }
    return x.reshape(N * T, -1), tables | dict(cu_seqlens=cu_seqlens)


def _with_padding(table: Array, padding: int | bool) -> Array:
    """[2 N ..]: each sequence's entry, then its padding's."""
    pairs = jnp.stack([table, jnp.full_like(table, padding)], axis=1)
    return pairs.reshape(-1, *table.shape[1:])
