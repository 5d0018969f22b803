"""Makes tests/data/hf_*.npz: transformers' linear attention layers, recorded on CPU.

    python tests/make_hf_goldens.py      # needs torch 2.13 and transformers 5.23

Tiny layers with random weights, in float32. hf_layers.py says what a record holds.
"""

import contextlib
import importlib
import json
import pathlib
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "data"
PROMPT = 71  # odd, and more than transformers' chunk of 64

QWEN = dict(
    hidden_size=40,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=16,
    linear_value_head_dim=12,
    num_hidden_layers=4,
)
# Configuration and layer by model, and sizes of a layer.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextGatedDeltaNet", QWEN),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5GatedDeltaNet",
        QWEN | dict(linear_num_key_heads=3, linear_key_head_dim=8),
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        "OlmoHybridGatedDeltaNet",
        QWEN
        | dict(
            linear_num_value_heads=2,
            linear_key_head_dim=12,
            linear_value_head_dim=24,
            num_attention_heads=2,
        ),
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearDeltaAttention",
        dict(
            hidden_size=40,
            linear_num_heads=3,
            linear_head_dim=16,
            num_hidden_layers=4,
        ),
    ),
}
KEPT = ("hidden_size", "rms_norm_eps")
# Functions of transformers' modules that run the rule.
RULES = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
)


def record(model: str, sizes: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """A prefill of two rows and a decode step after it."""
    torch.manual_seed(seed)
    config_name, layer_name, _ = MODELS[model]
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = getattr(transformers, config_name)(**sizes)
    layer = getattr(modeling, layer_name)(config, 0)
    _randomise(layer)
    kept = {key: x for key, x in config.to_dict().items() if key in KEPT}
    kept |= {key: x for key, x in config.to_dict().items() if key.startswith("linear_")}
    found = {"config": np.array(json.dumps(kept))}
    for name, weight in layer.named_parameters():
        found[f"weights/{name}"] = weight.detach().numpy()
    cache = transformers.DynamicCache(config=config)
    for phase, tokens in (("prefill", PROMPT), ("decode", 1)):
        x = torch.randn(2, tokens, config.hidden_size)
        seen = _call(modeling, layer, x, cache)
        found |= {f"{phase}/{name}": x.numpy().copy() for name, x in seen.items()}
    return found


@torch.no_grad()
def _randomise(layer: torch.nn.Module) -> None:
    """Gates of every strength, and no weight that a wrong layer could do without."""
    for name, weight in layer.named_parameters():
        if name.endswith("A_log"):
            weight.uniform_(-4, 2)
        elif name.endswith("dt_bias"):
            weight.normal_()
        elif "norm" in name:
            weight.normal_(1, 0.3)
        else:
            weight.normal_(0, weight[0].numel() ** -0.5)


@torch.no_grad()
def _call(modeling: Any, layer: torch.nn.Module, x: torch.Tensor, cache: Any) -> dict:
    """What the modules of one call of the layer gave, by the names of hf_layers.py."""
    seen = {"x": x}

    def keep_projection(name):
        return lambda module, given, out: seen.update({f"projections/{name}": out})

    def keep_norm(module, given, out):
        gate = given[1].reshape(*x.shape[:2], -1, given[1].shape[-1])
        seen.update(gate=gate, norm=out.reshape(gate.shape))

    def keep_rule(rule):
        def run(q, k, v, g, beta, **options):
            out, state = rule(q, k, v, g=g, beta=beta, **options)
            seen.update(q=q, k=k, v=v, log_decay=g, beta=beta, out=out)
            seen.update(recurrent=state.transpose(-1, -2))
            return out, state

        return run

    with contextlib.ExitStack() as undone:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                hook = module.register_forward_hook(keep_projection(name))
                undone.callback(hook.remove)
            if name.endswith("norm"):
                undone.callback(module.register_forward_hook(keep_norm).remove)
        for name in RULES:
            if hasattr(modeling, name):
                rule = keep_rule(getattr(modeling, name))
                undone.enter_context(mock.patch.object(modeling, name, rule))
        layer(x, cache_params=cache)
    # transformers keeps the last W inputs, of which the oldest is done with
    return seen | {"conv": cache.get_conv_state(0, state_idx=0)[..., 1:]}


def main() -> None:
    for model, (_, _, sizes) in MODELS.items():
        path = FOLDER / f"hf_{model}.npz"
        np.savez_compressed(path, **record(model, sizes))
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
