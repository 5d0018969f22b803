"""Layers and models against transformers' own, live: other seeds and sizes than the
recorded; and whether transformers reads the folders that are saved here.

Not collected by itself, for it needs torch 2.13 and transformers 5.23; .ci/run installs
them on Python 3.11 and names this file.
"""

import dataclasses

import checkpoints
import hf_layers
import hf_models
import make_hf_goldens
import make_model_goldens
import pytest
import torch
import transformers
from transformers.models.qwen3_5_moe import (
    configuration_qwen3_5_moe,
    modeling_qwen3_5_moe,
)
from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

from gdn_jax import models, nn, testing

# What the recorded layers leave out: real head dims, one value head a key head, other
# widths of the convolution.
SIZES = {
    "qwen3_next": dict(linear_key_head_dim=128, linear_value_head_dim=128),
    "qwen3_5": dict(linear_num_value_heads=3, linear_conv_kernel_dim=3),
    "olmo_hybrid": dict(linear_key_head_dim=96, linear_value_head_dim=192),
    "kimi_linear": dict(linear_head_dim=128, linear_conv_kernel_dim=2),
}
# And what the recorded models do: embeddings tied the other way, other MLPs, one head
# of keys and values for all or for each, the published share of rope, real head dims.
MODEL_SIZES = {
    "qwen3_next": dict(
        decoder_sparse_step=2,
        mlp_only_layers=[],
        norm_topk_prob=False,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "qwen3_5": dict(
        head_dim=16,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25
        ),
        num_key_value_heads=4,
        linear_conv_kernel_dim=3,
        tie_word_embeddings=False,
    ),
    "qwen3_5_moe": dict(
        num_experts_per_tok=5,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
    ),
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


@pytest.mark.parametrize("name", make_model_goldens.MODELS)
def test_whole_models_agree(name, tmp_path):
    _, _, sizes = make_model_goldens.MODELS[name]
    make_model_goldens.make(tmp_path, name, sizes | MODEL_SIZES[name], seed=1)
    case = hf_models.read(tmp_path)
    for run in hf_models.RUNS:
        assert not hf_models.wrong(run(case)), run.__name__
    errors, tokens = hf_models.greedy(case)
    assert not hf_models.wrong(errors)
    assert tokens == case.tokens[0, case.prompt :].tolist()


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_folders_go_both_ways(name, tmp_path):
    model, params = checkpoints.make(name)
    models.save(tmp_path / "ours", model, params)
    architecture = model.config.to_hf()["architectures"][0]
    theirs, info = getattr(transformers, architecture).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert {what: names for what, names in info.items() if names} == {}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, params = models.load(tmp_path / "theirs")
    models.save(tmp_path / "again", loaded, params, max_shard_bytes=5000)
    again = type(theirs).from_pretrained(tmp_path / "again").state_dict()
    wanted = theirs.state_dict()
    assert again.keys() == wanted.keys()
    assert [name for name, x in wanted.items() if not torch.equal(again[name], x)] == []


@pytest.mark.parametrize("name", make_model_goldens.MODELS)
def test_transformers_own_defaults_are_read(name, tmp_path):
    config_name, _, _ = make_model_goldens.MODELS[name]
    theirs = getattr(transformers, config_name)()
    theirs.save_pretrained(tmp_path)
    config = models.Config.from_hf(tmp_path)
    for field in dataclasses.fields(config):
        ours, wanted = getattr(config, field.name), getattr(theirs, field.name, None)
        if isinstance(ours, tuple):
            wanted = tuple(wanted or ())
        if field.name in theirs.rope_parameters:
            wanted = theirs.rope_parameters[field.name]
        assert wanted is None or ours == wanted, field.name


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
