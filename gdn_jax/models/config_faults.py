"""What is wrong with a model's config."""

import dataclasses
from typing import Any, get_origin

LAYER_TYPES = ("linear_attention", "full_attention")
# Text models by their `model_type`; a multimodal checkpoint's is without "_text".
MODEL_TYPES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
DIVISIBLE = (
    ("num_attention_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)


def faults_of(config: Any):
    """Of a `Config`, each in words; those of values once all types are right."""
    wrong = list(_wrong_types(config))
    yield from wrong or _wrong_values(config)


def _wrong_types(config: Any):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind: Any = get_origin(field.type) or field.type
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool):
            yield f"{field.name} is {value!r}, wanted {kind.__name__}"
        elif field.name in POSITIVE and not value > 0:
            yield f"{field.name} is {value!r}, wanted > 0"


def _wrong_values(config: Any):
    if config.model_type not in MODEL_TYPES:
        wanted = ", ".join(MODEL_TYPES)
        yield f"model_type is {config.model_type!r}, wanted one of {wanted}"
    if not config.layer_types:
        yield "layer_types is empty"
    for name in sorted({t for t in config.layer_types if t not in LAYER_TYPES}):
        yield f"layer_types has {name!r}, wanted {' or '.join(LAYER_TYPES)}"
    if config.decoder_sparse_step < 1:
        yield f"decoder_sparse_step is {config.decoder_sparse_step}, wanted >= 1"
    elif config.intermediate_size < 1:
        layers = max(config.num_hidden_layers, config.num_mtp_layers)
        dense = [i for i in range(layers) if not config.is_sparse(i)]
        if dense:
            yield f"intermediate_size is 0, but layers {dense} have no experts"
    for whole, part in DIVISIBLE:
        if getattr(config, whole) % getattr(config, part):
            yield (
                f"{whole} is {getattr(config, whole)}, wanted a multiple of {part} = "
                f"{getattr(config, part)}"
            )
    if config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        yield (
            f"partial_rotary_factor is {config.partial_rotary_factor}, wanted an even "
            f"part of head_dim = {config.head_dim}"
        )
    if config.num_experts and not 0 < config.num_experts_per_tok <= config.num_experts:
        yield (
            f"num_experts_per_tok is {config.num_experts_per_tok}, wanted 1 to "
            f"num_experts = {config.num_experts}"
        )
