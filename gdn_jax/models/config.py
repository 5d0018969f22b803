"""What a text model is built of."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from gdn_jax.models.config_faults import MODEL_TYPES, faults_of, is_sparse
from gdn_jax.models.config_file import MTP_KEYS, ROPE_KEYS, fields_of, read, text_of
from gdn_jax.ops import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The text model of Qwen3-Next or Qwen3.5, under transformers' names.

    Attributes:
      model_type: "qwen3_next" (whose projections of the linear layers are interleaved),
        "qwen3_5_text" or "qwen3_5_moe_text".
      layer_types: "linear_attention" (Gated DeltaNet) or "full_attention", for each
        layer.
      intermediate_size: width of the dense MLPs.
      num_experts: 0 for dense MLPs alone.
      decoder_sparse_step: layer i has experts if this divides i + 1.
      mlp_only_layers: indices i of layers that have none all the same.
      partial_rotary_factor: the share of a head's features that rope turns.
      num_mtp_layers: layers of the multi-token prediction head; 0 for none.
      eos_token_id: tokens that end a text.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    rope_theta: float = 1e4
    partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self):
        if faults := list(faults_of(dataclasses.fields(self), vars(self))):
            raise ValueError(f"config: {checks.listed(faults)}")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts; those of the MTP head are counted from 0 too."""
        experts = self.num_experts, self.decoder_sparse_step, self.mlp_only_layers
        return is_sparse(layer, *experts)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | pathlib.Path) -> "Config":
        """From the contents of a config.json, or from its path or its folder's.

        A multimodal checkpoint's `text_config` is taken. Keys known to be inert are
        left out; every other key that is not known here is refused by name, since it
        might change what the model computes.

        Raises:
          FileNotFoundError: no such file.
          ValueError: unknown keys or values; all of them are listed, behind the file.
        """
        source = "config.json"
        if not isinstance(config, Mapping):
            source = pathlib.Path(config)
            source = source / "config.json" if source.is_dir() else source
            config = read(source)
        known = dataclasses.fields(cls)
        fields, faults = fields_of(text_of(config), known)
        faults += faults_of(known, fields)
        if faults:
            raise ValueError(
                f"{source}: {checks.listed(faults)}. This library builds the text "
                f"models {', '.join(MODEL_TYPES)}; a key that changes nothing may be "
                "deleted."
            )
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that `from_hf` reads as this.

        The number of MTP layers, where there are any, has every name that its readers
        look for.
        """
        fields = dataclasses.asdict(self)
        rope = {key: fields.pop(key) for key in ROPE_KEYS}
        fields["rope_parameters"] = dict(rope_type="default", **rope)
        fields["num_hidden_layers"] = self.num_hidden_layers
        if self.num_mtp_layers:
            fields |= dict.fromkeys(MTP_KEYS, self.num_mtp_layers)
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return fields | dict(architectures=[ARCHITECTURES[self.model_type]])


ARCHITECTURES = dict(
    qwen3_next="Qwen3NextForCausalLM",
    qwen3_5_text="Qwen3_5ForCausalLM",
    qwen3_5_moe_text="Qwen3_5MoeForCausalLM",
)
