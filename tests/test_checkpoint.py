"""Folders of Hugging Face's: load and save."""

import dataclasses
import itertools
import json
import os

import checkpoints
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from checkpoints import CONV, MODELS, assert_same, contents, edit, edit_json, make
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.errors import JaxRuntimeError
from safetensors.numpy import load_file

from gdn_jax import _trees, models
from gdn_jax.models import files, parameters, rules

saved, copied = checkpoints.saved, checkpoints.copied


@pytest.mark.parametrize("name", MODELS)
def test_save_load_save(saved, tmp_path, name):
    folder, model, params = saved(name)
    loaded, same = models.load(folder)
    assert loaded == model
    assert_same(same, params)
    models.save(tmp_path, loaded, same)
    assert contents(tmp_path) == contents(folder)


def test_shards(saved, tmp_path):
    _, model, params = saved("3.5 with experts and MTP")
    models.save(tmp_path, model, params, max_shard_bytes=9000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / files.INDEX).read_text())
    tensors = [load_file(shard) for shard in shards]
    sizes = [sum(x.nbytes for x in shard.values()) for shard in tensors]
    assert max(sizes) <= 9000 and index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {
        name: file.name
        for file, shard in zip(shards, tensors, strict=True)
        for name in shard
    }
    assert_same(models.load(tmp_path)[1], params)


@pytest.mark.parametrize("name", MODELS)
def test_rules_fill_each_parameter_once(name):
    model, _ = make(name)
    for fused in (False, True):
        names = []
        for path, target in parameters.find_targets(model).items():
            filled = np.zeros(target.shape, int)
            for source in rules.sources_of(path, target.shape, fused):
                names.append(source.name)
                filled[source.region] += 1
            assert (filled == 1).all(), path
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "fields",
    [
        dict(mlp_only_layers=(0, 3)),
        dict(mlp_only_layers=(0, 1, 2, 3)),
        dict(decoder_sparse_step=2, num_mtp_layers=3),
        dict(decoder_sparse_step=3, num_mtp_layers=0),
    ],
    ids=str,
)
def test_a_layer_of_each_kind_tells_of_all(fields):
    model, _ = make("next with experts")
    types = ("linear_attention", "full_attention", "full_attention") * 2
    config = dataclasses.replace(model.config, layer_types=types, **fields)
    model = model.clone(config=config)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    whole = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    found = parameters.find_targets(model)
    assert {path: (x.shape, x.dtype, x.names) for path, x in found.items()} == {
        path: (x.value.shape, x.value.dtype, x.names)
        for path, x in flatten_dict(whole, sep="/").items()
    }


def test_names_of_qwen(saved):
    """As transformers 5.23 and the published checkpoints have them."""
    tensors = load_file(saved("next with experts")[0] / "model.safetensors")
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes["model.layers.0.linear_attn.in_proj_qkvz.weight"] == (48, 16)
    assert shapes[CONV] == (32, 1, 4)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (64, 16)
    assert shapes["model.layers.1.mlp.gate.weight"] == (4, 16)
    assert shapes["model.layers.1.mlp.experts.3.up_proj.weight"] == (6, 16)
    assert shapes["model.layers.1.mlp.shared_expert_gate.weight"] == (1, 16)
    assert shapes["mtp.layers.0.mlp.experts.0.down_proj.weight"] == (16, 6)
    assert shapes["mtp.fc.weight"] == (16, 32)
    tensors = load_file(saved("3.5 with experts")[0] / "model.safetensors")
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes["model.layers.0.linear_attn.in_proj_qkv.weight"] == (32, 16)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (4, 12, 16)
    assert shapes["model.layers.0.mlp.experts.down_proj"] == (4, 16, 6)


def test_experts_in_one_tensor_each(saved, copied):
    def split(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            stem, kind = name.rsplit(".", 1)
            for e, x in enumerate(tensors.pop(name)):
                if kind == "down_proj":
                    tensors[f"{stem}.{e}.down_proj.weight"] = x
                else:
                    gate, up = np.split(x, 2)
                    tensors[f"{stem}.{e}.gate_proj.weight"] = gate
                    tensors[f"{stem}.{e}.up_proj.weight"] = up

    folder = copied("3.5 with experts")
    edit(folder, split)
    assert_same(models.load(folder)[1], saved("3.5 with experts")[2])


@pytest.mark.parametrize(
    "prefixes", [("model.language_model.", ""), ("language_model.",) * 2]
)
def test_multimodal(saved, copied, prefixes):
    inner, outer = prefixes

    def nest(tensors):
        for name in list(tensors):
            x = tensors.pop(name)
            if name.startswith("mtp."):
                tensors[name] = x
            elif inner.startswith("model.") and name.startswith("model."):
                tensors[inner + name.removeprefix("model.")] = x
            else:
                tensors[outer + name] = x
        tensors["model.visual.blocks.0.attn.qkv.weight"] = np.zeros((3, 3), np.int8)

    folder = copied("3.5")
    edit(folder, nest)
    text = json.loads((folder / "config.json").read_text())
    config = dict(model_type="qwen3_5", text_config=text, vision_config=dict(depth=1))
    (folder / "config.json").write_text(json.dumps(config))
    model, params = models.load(folder)
    assert model == saved("3.5")[1]
    assert_same(params, saved("3.5")[2])


def test_the_head_of_tied_embeddings_is_ignored(saved, copied):
    folder = copied("3.5 tied")
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones(3)}))
    assert_same(models.load(folder)[1], saved("3.5 tied")[2])


def test_mtp_layers_are_counted(saved, copied):
    folder = copied("3.5")

    def without(tensors):
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    edit(folder, without)
    model, params = models.load(folder)
    assert model.config.num_mtp_layers == 0 and "mtp" not in params


@pytest.mark.parametrize("eos", [9, [9, 3]])
def test_generation_config_says_where_texts_end(copied, eos):
    folder = copied("3.5 tied")
    edit_json(folder, "generation_config.json", eos_token_id=eos, top_p=0.9)
    wanted = (9,) if eos == 9 else (9, 3)
    assert models.load(folder)[0].config.eos_token_id == wanted
    edit_json(folder, "generation_config.json", eos_token_id=None)
    assert models.load(folder)[0].config.eos_token_id == (7,)


def test_a_save_over_another_model_says_where_texts_end(copied):
    folder = copied("3.5 tied")
    edit_json(folder, "generation_config.json", eos_token_id=2, top_p=0.9)
    model, params = models.load(folder)
    config = dataclasses.replace(model.config, eos_token_id=(5,))
    models.save(folder, model.clone(config=config), params)
    assert models.load(folder)[0].config.eos_token_id == (5,)
    kept = json.loads((folder / "generation_config.json").read_text())
    assert kept["top_p"] == 0.9


def test_too_little_memory_says_what_to_do(copied, monkeypatch):
    def fail(*_):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(MemoryError, match="bfloat16, on a mesh of several devices"):
        models.load(copied("3.5 tied"))


@pytest.mark.parametrize(
    ("name", "dtype"), [("3.5", jnp.float32), ("3.5 tied", "bfloat16")]
)
def test_dtype(saved, name, dtype):
    folder, _, params = saved(name)
    model, cast = models.load(folder, dtype=dtype)
    assert model.dtype == model.param_dtype == jnp.dtype(dtype)
    keep = ("A_log", "dt_bias")
    wanted = {
        path: x if path[-1] in keep else x.astype(dtype)
        for path, x in flatten_dict(params).items()
    }
    assert_same(cast, unflatten_dict(wanted))


def test_decays_of_a_bfloat16_file_become_float32(saved, copied):
    folder, path = copied("3.5"), "model.layers.0.linear_attn.A_log"

    def cast(tensors):
        tensors[path] = tensors[path].astype(jnp.bfloat16)

    edit(folder, cast)
    A_log = models.load(folder)[1]["layers_0"]["mixer"]["A_log"]
    wanted = saved("3.5")[2]["layers_0"]["mixer"]["A_log"].astype(jnp.bfloat16)
    assert A_log.dtype == jnp.float32
    np.testing.assert_array_equal(A_log, wanted.astype(jnp.float32))


def test_a_save_that_fails_leaves_the_old_files(copied, monkeypatch):
    folder = copied("3.5 tied")
    before, write = contents(folder), _trees.write
    model, params = models.load(folder)
    calls = itertools.count()

    def fail(tensors, path, metadata):
        if next(calls) == 2:
            raise OSError("no space left")
        write(tensors, path, metadata)

    monkeypatch.setattr(_trees, "write", fail)
    with pytest.raises(OSError, match="no space"):
        models.save(
            folder, model, jax.tree.map(lambda x: x + 1, params), max_shard_bytes=1
        )
    assert contents(folder) == before


@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_a_save_that_fails_amid_its_renames_is_refused(copied, monkeypatch, number):
    """New and old files beside each other are no model; the next save makes one."""
    folder, replace = copied("3.5 tied"), os.replace
    (folder / "model_adapter.safetensors").touch()
    model, params = models.load(folder)
    changed = jax.tree.map(lambda x: x + 1, params)
    calls = itertools.count()

    def fail(old, new):
        if next(calls) == number:
            raise OSError("no such disk")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no such disk"):
        models.save(folder, model, changed, max_shard_bytes=1)
    if number == 0:
        assert_same(models.load(folder)[1], params)
    else:
        with pytest.raises(ValueError, match="was stopped while its files"):
            models.load(folder)
    calls = itertools.count(10**6)
    models.save(folder, model, changed, max_shard_bytes=1)
    assert_same(models.load(folder)[1], changed)
    assert (folder / "model_adapter.safetensors").exists()


def test_files_may_be_read_by_whom_the_umask_lets(saved, tmp_path):
    _, model, params = saved("3.5 tied")
    before = os.umask(0o027)
    try:
        models.save(tmp_path, model, params)
        _trees.save(tmp_path / "state", dict(x=np.zeros(1)), {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize("size", [0, -1, "x"])
def test_a_wrong_size_of_files_is_told(size, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    _, model, params = saved("3.5 tied")
    with pytest.raises(ValueError, match="max_shard_bytes must be a number > 0"):
        models.save(tmp_path / "new", model, params, max_shard_bytes=size)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file. Name a folder"):
        models.save(tmp_path / "file", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_save_takes_the_place_of_older_ones(saved, tmp_path):
    _, model, params = saved("3.5 tied")
    (tmp_path / "tokenizer.json").write_text("kept")
    (tmp_path / ".saving").mkdir()  # of one that was killed
    (tmp_path / ".saving" / "model.safetensors").write_text("half")
    for most in (3000, 5000, 5e9):
        models.save(tmp_path, model, params, max_shard_bytes=most)
        assert_same(models.load(tmp_path)[1], params)
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_boxed_parameters_are_saved(saved, tmp_path):
    folder, model, params = saved("3.5 tied")
    boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), params)
    models.save(tmp_path, model, boxed)
    assert contents(tmp_path) == contents(folder)


def test_wrong_parameters_are_not_saved(saved, tmp_path):
    _, model, params = saved("3.5 tied")
    wrong = params | dict(other=jnp.ones(1), norm=dict(weight=jnp.ones(3, jnp.int32)))
    del wrong["embed"]
    with pytest.raises(ValueError) as raised:
        models.save(tmp_path, model, wrong)
    for text in ("embed/embedding is missing", "other is no param", "(3,)", "int32"):
        assert text in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_progress(saved, capsys):
    folder = saved("3.5 tied")[0]
    models.load(folder)
    assert capsys.readouterr().err == ""
    models.load(folder, progress=True)
    assert "loading 3.5 tied" in capsys.readouterr().err
