"""What is wrong with a model's config."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

import numpy as np

from gdn_jax.ops.checks import shown

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
    "decoder_sparse_step",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
# A file may claim any size, and what is made before the weights are looked at must not
# grow with it: layers and experts are listed, and a convolution's taps are unrolled.
MOST_LAYERS = 1000
MOST_EXPERTS = 4096
MOST_TAPS = 32
# JAX counts along an axis in int32, where several of a layer's may lie side by side.
SIZE_BITS = 28
FLOAT_MAX = float(np.finfo(np.float32).max)
WIDTHS = (
    ("num_attention_heads", "head_dim"),
    ("linear_num_key_heads", "linear_key_head_dim"),
    ("linear_num_value_heads", "linear_value_head_dim"),
)
DIVISIBLE = (
    ("num_attention_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)


def faults_of(
    fields: tuple[dataclasses.Field, ...], values: Mapping[str, Any]
) -> Iterator[str]:
    """Of values of a Config's fields, where some may be missing, each fault in words.
    What hangs on a value that is missing or wrong is not judged."""
    right = {}
    for field in fields:
        if field.name not in values:
            continue
        if fault := _wrong_type(field, values[field.name]):
            yield fault
        else:
            right[field.name] = values[field.name]
    for whole, part in DIVISIBLE:
        if {whole, part} <= right.keys() and right[whole] % right[part]:
            wanted = f"a multiple of {part} = {right[part]}"
            yield f"{whole} is {right[whole]}, wanted {wanted}"
    for heads, size in WIDTHS:
        if {heads, size} <= right.keys() and right[heads] * right[size] >> SIZE_BITS:
            width = right[heads] * right[size]
            yield f"{heads} * {size} is {width}, wanted < 2^{SIZE_BITS}"
    for check in CHECKS:
        names = inspect.signature(check).parameters.keys()
        if names <= right.keys():
            yield from check(**{name: right[name] for name in names})


def is_sparse(
    layer: int,
    num_experts: int,
    decoder_sparse_step: int,
    mlp_only_layers: tuple[int, ...],
) -> bool:
    picked = (layer + 1) % decoder_sparse_step == 0
    return num_experts > 0 and picked and layer not in mlp_only_layers


def _wrong_type(field: dataclasses.Field, value: Any) -> str | None:
    kind: Any = get_origin(field.type) or field.type
    if not _is_a(value, kind):
        return f"{field.name} is {shown(value)}, wanted {kind.__name__}"
    if kind is tuple:
        if len(value) > MOST_LAYERS:
            return f"{field.name} has {len(value)} entries, wanted <= {MOST_LAYERS}"
        element, _ = get_args(field.type)
        for each in value:
            if not _is_a(each, element):
                return f"{field.name} has {shown(each)}, wanted {element.__name__}"
            if fault := _too_large(each, element):
                return f"{field.name} has {shown(each)}, wanted {fault}"
        return None
    if field.name in POSITIVE and not value > 0:
        return f"{field.name} is {shown(value)}, wanted > 0"
    if fault := _too_large(value, kind):
        return f"{field.name} is {shown(value)}, wanted {fault}"
    return None


def _too_large(value: Any, kind: Any) -> str | None:
    """What is wanted of a number instead, if JAX could not hold it."""
    bits = SIZE_BITS if kind is int else 31  # a float may be written without a point
    if isinstance(value, int) and abs(value) >> bits:
        return f"< 2^{bits}"
    if isinstance(value, float) and abs(value) > FLOAT_MAX:
        return "finite in float32"
    return None


def _is_a(value: Any, kind: Any) -> bool:
    wanted = (int, float) if kind is float else kind
    return isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)


# Each takes the fields that it judges, by their names.


def _model_type(model_type):
    if model_type not in MODEL_TYPES:
        wanted = ", ".join(MODEL_TYPES)
        yield f"model_type is {shown(model_type)}, wanted one of {wanted}"


def _layer_types(layer_types):
    if not layer_types:
        yield "layer_types is empty"
    for name in sorted(set(layer_types) - set(LAYER_TYPES)):
        yield f"layer_types has {shown(name)}, wanted {' or '.join(LAYER_TYPES)}"


def _mtp_layers(num_mtp_layers):
    if not 0 <= num_mtp_layers <= MOST_LAYERS:
        yield f"num_mtp_layers is {num_mtp_layers}, wanted 0 to {MOST_LAYERS}"


def _taps(linear_conv_kernel_dim):
    if linear_conv_kernel_dim > MOST_TAPS:
        size = linear_conv_kernel_dim
        yield f"linear_conv_kernel_dim is {size}, wanted <= {MOST_TAPS}"


def _dense_layers(
    intermediate_size,
    layer_types,
    num_mtp_layers,
    num_experts,
    decoder_sparse_step,
    mlp_only_layers,
):
    experts = num_experts, decoder_sparse_step, mlp_only_layers
    layers = range(min(max(len(layer_types), num_mtp_layers), MOST_LAYERS))
    dense = [layer for layer in layers if not is_sparse(layer, *experts)]
    if dense and intermediate_size < 1:
        size = intermediate_size
        yield f"intermediate_size is {size}, but layers {shown(dense)} have no experts"


def _rotary(head_dim, partial_rotary_factor):
    share = partial_rotary_factor
    if not 0 <= share <= 1 or int(head_dim * share) % 2:
        wanted = f"an even part of head_dim = {head_dim}"
        yield f"partial_rotary_factor is {share}, wanted {wanted}"


def _experts(
    num_experts,
    num_experts_per_tok,
    moe_intermediate_size,
    shared_expert_intermediate_size,
):
    if not 0 <= num_experts <= MOST_EXPERTS:
        yield f"num_experts is {num_experts}, wanted 0 to {MOST_EXPERTS}"
    if num_experts <= 0:
        return
    if not 0 < num_experts_per_tok <= num_experts:
        wanted = f"1 to num_experts = {num_experts}"
        yield f"num_experts_per_tok is {num_experts_per_tok}, wanted {wanted}"
    if moe_intermediate_size < 1:
        size = moe_intermediate_size
        yield f"moe_intermediate_size is {size}, wanted >= 1 where there are experts"
    if shared_expert_intermediate_size < 1:
        got = f"shared_expert_intermediate_size is {shared_expert_intermediate_size}"
        yield f"{got}, wanted >= 1 where there are experts"


def _ends(eos_token_id):
    for token in eos_token_id:
        if token < 0:
            yield f"eos_token_id has {token}, wanted >= 0"


CHECKS = (
    _model_type,
    _layer_types,
    _mtp_layers,
    _taps,
    _dense_layers,
    _rotary,
    _experts,
    _ends,
)
