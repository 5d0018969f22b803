"""What a checkpoint's config.json says of its text model."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from gdn_jax.models.config_faults import LAYER_TYPES, MODEL_TYPES, faults_of

MOE_TYPES = ("qwen3_next", "qwen3_5_moe_text")

# Keys that change nothing about what the text model computes.
INERT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "image_token_id",
        "initializer_range",
        "language_model_only",
        "mamba_ssm_dtype",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "use_cache",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_start_token_id",
    )
)
# Keys that may only say what is built.
FIXED: dict[str, tuple[Any, ...]] = dict(
    attention_bias=(False,),
    attn_output_gate=(True,),
    hidden_act=("silu",),
    mtp_use_dedicated_embeddings=(False,),
    output_gate_type=("silu", "swish"),
    rope_scaling=(None,),
    use_sliding_window=(False,),
)
# The number of MTP layers: transformers' name, vLLM's for Qwen3.5, for Qwen3-Next.
MTP_KEYS = ("num_mtp_layers", "mtp_num_hidden_layers", "num_nextn_predict_layers")
# Of keys that are not known.
HINTS = dict(
    quantization_config="quantised weights are not read, take them in bfloat16"
)
ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
# Read besides Config's own fields.
OTHER_KEYS = (
    "num_hidden_layers",
    "full_attention_interval",
    "mtp_layer_types",
    "rope_parameters",
)
# Rope over a picture's axes; for text the three positions are one.
ROPE_INERT = frozenset(("mrope_section", "mrope_interleaved"))


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
      decoder_sparse_step, mlp_only_layers: layer i has experts if it is not one of the
        latter and the former divides i + 1.
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
        faults = list(faults_of(self))
        if faults:
            raise ValueError("config: " + "; ".join(faults))

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts; those of the MTP head are counted from 0 too."""
        picked = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and picked and layer not in self.mlp_only_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | pathlib.Path) -> "Config":
        """From the contents of a config.json, or from its path or its folder's.

        A multimodal checkpoint's `text_config` is taken. Keys known to be inert are
        left out; every other key that is not known here is refused by name, since it
        might change what the model computes.

        Raises:
          FileNotFoundError: no such file.
          ValueError: unknown keys or values; all of them are listed.
        """
        if not isinstance(config, Mapping):
            path = pathlib.Path(config)
            config = read(path / "config.json" if path.is_dir() else path)
        return cls(**_fields(_text(config)))

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


def read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; a model's folder holds its config.json and safetensors files."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from None


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys; what a multimodal file says outside of them goes first."""
    outer = dict(config)
    text = outer.pop("text_config", None)
    if text is None:
        return outer
    outer.pop("model_type", None)
    return dict(text) | {k: v for k, v in outer.items() if v is not None}


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """A Config's fields; every fault of the file is in one error."""
    known = {field.name: field for field in dataclasses.fields(Config)}
    config = {k: v for k, v in config.items() if k not in INERT}
    # A null says what leaving the key out says, but where no key is known.
    read = {*known, *FIXED, *MTP_KEYS, *ROPE_KEYS, *OTHER_KEYS}
    config = {k: v for k, v in config.items() if v is not None or k not in read}
    faults = []
    for key, allowed in FIXED.items():
        if (value := config.pop(key, allowed[0])) not in allowed:
            faults.append(f"{key} is {value!r}, only {allowed[0]!r} is built")
    layers = _pop_count(config, "num_hidden_layers", None, faults)
    interval = _pop_count(config, "full_attention_interval", 4, faults)
    types = config.pop("layer_types", None)
    if types is None and layers is not None:
        types = [LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers)]
    elif types is not None and layers not in (None, len(types)):
        faults.append(f"num_hidden_layers is {layers}, layer_types has {len(types)}")
    fields = dict(layer_types=tuple(types or ())) | _rope(config, faults)
    fields["num_mtp_layers"] = _mtp_layers(config, faults)
    for key, value in config.items():
        if key not in known:
            faults.append(f"unknown key {key!r} ({HINTS.get(key, repr(value))})")
        else:
            fields[key] = as_tuple(value) if "tuple" in str(known[key].type) else value
    missing = [
        name
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING
    ]
    if fields.get("model_type") in MOE_TYPES and "num_experts" not in fields:
        missing.append("num_experts")
    faults += [f"{name} is missing" for name in missing]
    if faults:
        raise ValueError(
            "config.json: "
            + "; ".join(faults)
            + ". This library builds the text models "
            f"{', '.join(MODEL_TYPES)}; a key that changes nothing may be deleted."
        )
    return fields


def _pop_count(config: dict[str, Any], key: str, default: Any, faults: list[str]):
    value = config.pop(key, None)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        faults.append(f"{key} is {value!r}, wanted an int >= 1")
        return default
    return value


def _rope(config: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """rope_theta and partial_rotary_factor, from their old or their new place."""
    found = {key: config.pop(key) for key in ROPE_KEYS if key in config}
    rope = dict(config.pop("rope_parameters", None) or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind != "default":
        faults.append(f"rope_type is {kind!r}, only 'default' is built")
    found |= {key: rope.pop(key) for key in ROPE_KEYS if key in rope}
    unknown = [key for key in rope if key not in ROPE_INERT]
    faults += [f"unknown key {key!r} of rope_parameters" for key in unknown]
    return {key: value for key, value in found.items() if value is not None}


def _mtp_layers(config: dict[str, Any], faults: list[str]) -> int:
    for kind in set(config.pop("mtp_layer_types", None) or ()) - {LAYER_TYPES[1]}:
        faults.append(f"mtp_layer_types has {kind!r}, only {LAYER_TYPES[1]!r} is built")
    found = {key: config.pop(key) for key in MTP_KEYS if key in config}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} is {count}" for key, count in found.items())
        faults.append(f"{said}, but all are the number of MTP layers")
    return max(found.values(), default=0)


def as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
