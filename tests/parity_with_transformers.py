"""The layers against transformers' own, live: other seeds and sizes than the recorded.

Not collected by itself, for it needs torch 2.13 and transformers 5.23; .ci/run installs
them on Python 3.11 and names this file.
"""

import hf_layers
import make_hf_goldens
import pytest
import torch
from transformers.models.qwen3_5_moe import (
    configuration_qwen3_5_moe,
    modeling_qwen3_5_moe,
)
from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

from gdn_jax import nn, testing

# What the recorded layers leave out: real head dims, one value head a key head, other
# widths of the convolution.
SIZES = {
    "qwen3_next": dict(linear_key_head_dim=128, linear_value_head_dim=128),
    "qwen3_5": dict(linear_num_value_heads=3, linear_conv_kernel_dim=3),
    "olmo_hybrid": dict(linear_key_head_dim=96, linear_value_head_dim=192),
    "kimi_linear": dict(linear_head_dim=128, linear_conv_kernel_dim=2),
}


@pytest.mark.parametrize("changed", [False, True], ids=["recorded sizes", "others"])
@pytest.mark.parametrize("model", hf_layers.NAMES)
def test_every_module_agrees(model, changed):
    _, _, sizes = make_hf_goldens.MODELS[model]
    sizes = sizes | (SIZES[model] if changed else {})
    record = make_hf_goldens.record(model, sizes, seed=1)
    errors = hf_layers.errors(model, record, rule=None)
    assert len(errors) > 20
    wrong = {name: x for name, x in errors.items() if not x < hf_layers.TOLERANCE}
    assert not wrong


EXPERTS = {
    "qwen3_next": (
        modeling_qwen3_next.Qwen3NextSparseMoeBlock,
        configuration_qwen3_next.Qwen3NextConfig,
    ),
    "qwen3_5_moe": (
        modeling_qwen3_5_moe.Qwen3_5MoeSparseMoeBlock,
        configuration_qwen3_5_moe.Qwen3_5MoeTextConfig,
    ),
}


@pytest.mark.parametrize(
    "model, norm_topk",
    [("qwen3_next", True), ("qwen3_next", False), ("qwen3_5_moe", True)],
)
def test_the_experts_agree(model, norm_topk):
    block, config = EXPERTS[model]
    options = {"norm_topk_prob": norm_topk} if model == "qwen3_next" else {}
    torch.manual_seed(1)
    theirs = block(
        config(
            hidden_size=48,
            num_experts=12,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            **options,
        )
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        want = theirs(x).numpy()
    given = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    shared = {
        name: {"kernel": given[f"shared_expert.{name}_proj.weight"].T}
        for name in ("gate", "up", "down")
    }
    params = {
        "router": {"kernel": given["gate.weight"].T},
        "experts_gate_up": given["experts.gate_up_proj"].swapaxes(1, 2),
        "experts_down": given["experts.down_proj"].swapaxes(1, 2),
        "shared": shared,
        "shared_gate": {"kernel": given["shared_expert_gate.weight"].T},
    }
    layer = nn.MixtureOfExperts(48, 12, 3, 20, 28, norm_topk=norm_topk)
    y = layer.apply({"params": params}, x.numpy())
    assert testing.relative_error(y, want) < 1e-6
