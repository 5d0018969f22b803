"""What a checkpoint's config.json says of its text model."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from gdn_jax import _json
from gdn_jax.models.config_faults import LAYER_TYPES, MOST_LAYERS
from gdn_jax.ops.checks import shown

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
# Published ones have a few thousand; read, JSON takes many times its file's memory.
MOST_BYTES = 2**20


def read(path: pathlib.Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is something else, or no JSON object, or larger than `most_bytes`.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}; a model's folder holds its config.json and safetensors files."
        )
    try:
        if not path.is_file():  # reading a FIFO would wait for its other end
            raise ValueError("it is no file")
        with path.open("rb") as file:
            text = file.read(most_bytes + 1)
        if len(text) > most_bytes:
            raise ValueError(f"it has more than {most_bytes} bytes")
        return _json.parse(text.decode())
    except ValueError as error:
        text = f"{path} is no JSON object ({error}). Download it again."
        raise ValueError(text) from None


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys; what a multimodal file says outside of them goes first."""
    outer = dict(config)
    text = outer.pop("text_config", None)
    if not isinstance(text, Mapping):
        return outer if text is None else dict(config)  # in which it is unknown
    outer.pop("model_type", None)
    return dict(text) | {k: v for k, v in outer.items() if v is not None}


def fields_of(
    config: dict[str, Any], known: tuple[dataclasses.Field, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Those of a Config but for what is missing, and the faults of the file's keys."""
    types = {field.name: str(field.type) for field in known}
    config = {k: v for k, v in config.items() if k not in INERT}
    # A null says what leaving the key out says, but where no key is known.
    keys = {*types, *FIXED, *MTP_KEYS, *ROPE_KEYS, *OTHER_KEYS}
    config = {k: v for k, v in config.items() if v is not None or k not in keys}
    faults = []
    for key, allowed in FIXED.items():
        if (value := config.pop(key, allowed[0])) not in allowed:
            faults.append(f"{key} is {shown(value)}, only {allowed[0]!r} is built")
    given = _pop_layer_types(config, faults) | _pop_rope(config, faults)
    given["num_mtp_layers"] = _pop_mtp_layers(config, faults)
    for key, value in config.items():
        if key not in types:
            hint = HINTS.get(key, shown(value))
            faults.append(f"unknown key {shown(key)} ({hint})")
        else:
            given[key] = as_tuple(value) if "tuple" in types[key] else value
    fields = {field.name: field.default for field in known} | given
    if given.get("model_type") in MOE_TYPES and "num_experts" not in given:
        fields["num_experts"] = dataclasses.MISSING
    missing = [key for key, value in fields.items() if value is dataclasses.MISSING]
    # Why there are no layer_types is told already.
    faults += [f"{key} is missing" for key in missing if key != "layer_types"]
    return {key: fields[key] for key in fields if key not in missing}, faults


def _pop_layer_types(config: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """layer_types, which are attention every so often where the file names none; {}
    where a fault says why."""
    if not {"layer_types", "num_hidden_layers"} & config.keys():
        faults.append("num_hidden_layers is missing")
    layers = _pop_count(config, "num_hidden_layers", None, faults)
    if layers is not None and layers > MOST_LAYERS:
        faults.append(f"num_hidden_layers is {shown(layers)}, wanted <= {MOST_LAYERS}")
        layers = None
    interval = _pop_count(config, "full_attention_interval", 4, faults)
    if "layer_types" not in config:
        if layers is None:
            return {}
        types = (LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers))
        return dict(layer_types=tuple(types))
    types = as_tuple(config.pop("layer_types"))
    if layers not in (None, len(types)):
        faults.append(f"num_hidden_layers is {layers}, layer_types has {len(types)}")
    return dict(layer_types=types)


def _pop_count(
    config: dict[str, Any], key: str, default: Any, faults: list[str], least: int = 1
):
    value = config.pop(key, default)
    if value is not default and (type(value) is not int or value < least):
        faults.append(f"{key} is {shown(value)}, wanted an int >= {least}")
        return default
    return value


def _pop_rope(config: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """rope_theta and partial_rotary_factor, from their old or their new place."""
    found = {key: config.pop(key) for key in ROPE_KEYS if key in config}
    rope = config.pop("rope_parameters", {})
    if not isinstance(rope, Mapping):
        faults.append(f"rope_parameters is {shown(rope)}, wanted an object")
        return found
    rope = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind != "default":
        faults.append(f"rope_type is {shown(kind)}, only 'default' is built")
    found |= {key: rope.pop(key) for key in ROPE_KEYS if key in rope}
    unknown = [key for key in rope if key not in ROPE_INERT]
    faults += [f"unknown key {shown(key)} of rope_parameters" for key in unknown]
    return {key: value for key, value in found.items() if value is not None}


def _pop_mtp_layers(config: dict[str, Any], faults: list[str]) -> int:
    kinds = map(shown, as_tuple(config.pop("mtp_layer_types", LAYER_TYPES[1])))
    for kind in sorted(set(kinds) - {shown(LAYER_TYPES[1])}):
        faults.append(f"mtp_layer_types has {kind}, only {LAYER_TYPES[1]!r} is built")
    counts = {key: _pop_count(config, key, None, faults, 0) for key in MTP_KEYS}
    found = {key: count for key, count in counts.items() if count is not None}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} is {shown(count)}" for key, count in found.items())
        faults.append(f"{said}, but all are the number of MTP layers")
    return max(found.values(), default=0)


def as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
