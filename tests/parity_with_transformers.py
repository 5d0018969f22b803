"""The layer against transformers' own, live: other seeds and sizes than the recorded;
and whether transformers reads the folders that are saved here.

Not collected by itself, for it needs torch 2.13 and transformers 5.23; .ci/run installs
them on Python 3.11 and names this file.
"""

import checkpoints
import hf_layers
import make_hf_goldens
import pytest
import torch
import transformers

from gdn_jax import models

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
