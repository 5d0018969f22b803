"""Folders of Hugging Face's: load, save, and what is wrong with broken ones."""

import dataclasses
import itertools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from gdn_jax import models
from gdn_jax.models import checkpoint, cover, files, rules

DENSE = dict(
    vocab_size=48,
    hidden_size=16,
    layer_types=("linear_attention", "full_attention"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
    intermediate_size=24,
    eos_token_id=(7,),
)
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    shared_expert_intermediate_size=10,
)
# name: model_type, other fields, dtype
MODELS = {
    "next": ("qwen3_next", dict(num_mtp_layers=1), "float32"),
    "next with experts": ("qwen3_next", EXPERTS | dict(num_mtp_layers=1), "bfloat16"),
    "3.5": ("qwen3_5_text", dict(num_mtp_layers=2), "bfloat16"),
    "3.5 tied": ("qwen3_5_text", dict(tie_word_embeddings=True), "float32"),
    "3.5 with experts": ("qwen3_5_moe_text", EXPERTS, "float32"),
    "3.5 with experts and MTP": (
        "qwen3_5_moe_text",
        EXPERTS | dict(num_mtp_layers=1),
        "bfloat16",
    ),
}
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
CONV = "model.layers.0.linear_attn.conv1d.weight"


def make(name):
    model_type, fields, dtype = MODELS[name]
    config = models.Config(**DENSE | fields | dict(model_type=model_type))
    model = models.Model(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=target.shape), target.dtype)
        for path, target in checkpoint.find_targets(model).items()
    }
    return model, unflatten_dict(params, sep="/")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name -> (folder, model, params); folders are not to be written to."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            model, params = make(name)
            models.save(folder, model, params)
            made[name] = folder, model, params
        return made[name]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved(name)[0], tmp_path / "copied")

    return copy


def assert_same(got, want):
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for path, x in want.items():
        assert got[path].dtype == x.dtype, path
        np.testing.assert_array_equal(got[path], x, path)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def edit_json(folder, file="config.json", **changed):
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changed))


# Round trips


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
        for path, target in checkpoint.find_targets(model).items():
            filled = np.zeros(target.shape, int)
            for source in rules.sources_of(path, target.shape, fused):
                names.append(source.name)
                filled[source.region] += 1
            assert (filled == 1).all(), path
        assert len(names) == len(set(names))


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


# What other folders hold


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


# Broken folders: what is done to a copy, what is raised, and what the text holds


def drop(*names):
    return lambda folder: edit(folder, lambda x: [x.pop(name) for name in names])


def put(**tensors):
    return lambda folder: edit(folder, lambda x: x.update(tensors))


def cut(tensors):
    tensors[CONV] = tensors[CONV][:-1]
    tensors[NORM] = tensors[NORM][None]


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def shard(folder):
    """Two files and an index, behind each other."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = dict(a=names[: len(names) // 2], b=names[len(names) // 2 :])
    for half, of in halves.items():
        save_file({name: tensors[name] for name in of}, folder / f"{half}.safetensors")
    weight_map = {
        name: f"{half}.safetensors" for half in halves for name in halves[half]
    }
    edit_json(folder, files.INDEX, weight_map=weight_map)
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder):
    shard(folder)
    edit(folder, lambda x: x.pop(NORM), "b.safetensors")
    (folder / "a.safetensors").unlink()


def lose_the_index(folder):
    shard(folder)
    (folder / files.INDEX).write_text("{")


def repeat(folder):
    shard(folder)
    edit(folder, lambda x: x.update({EMBEDDING: np.ones(2)}), "b.safetensors")


def fuse_too(folder):
    shape = 4, 12, 16
    fused = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros(shape, jnp.bfloat16)}
    edit(folder, lambda x: x.update(fused))


def lose_experts(folder):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            if not name.endswith("experts.0.down_proj.weight"):
                del tensors[name]

    edit(folder, change)


def break_everything(folder):
    drop("lm_head.weight")(folder)
    put(stranger=np.ones(1))(folder)
    edit(folder, cut)


AGAIN = "download it again"
BROKEN = {
    "missing tensor": ("next", drop(NORM), ["1 missing", NORM]),
    "missing layer of MTP": (
        "3.5",
        drop("mtp.layers.0.self_attn.q_proj.weight"),
        ["1 missing", "mtp.layers.0.self_attn.q_proj.weight"],
    ),
    "extra tensor": (
        "next",
        put(**{"model.layers.7.mlp.up_proj.weight": np.ones(1)}),
        ["1 tensors that are not of this model: model.layers.7.mlp.up_proj.weight"],
    ),
    "wrong shapes": (
        "next",
        lambda folder: edit(folder, cut),
        [f"{CONV} [31, 1, 4], wanted [32, 1, 4]", f"{NORM} [1, 16], wanted [16]"],
    ),
    "wrong dtype": (
        "next",
        put(**{NORM: np.ones(16, np.int8)}),
        [f"{NORM} I8", "quantised"],
    ),
    "truncated file": ("next", truncate, ["model.safetensors (", AGAIN]),
    "absent file": (
        "next",
        lose_a_shard,
        ["a.safetensors (absent", "1 missing tensors: " + NORM],
    ),
    "broken index": ("next", lose_the_index, [files.INDEX, AGAIN]),
    "twice": ("next", repeat, [EMBEDDING, "in a.safetensors", "in b.safetensors"]),
    "experts twice": (
        "next with experts",
        fuse_too,
        ["model.layers.0.mlp.experts.gate_up_proj", "in one each"],
    ),
    "missing experts": (
        "next with experts",
        lose_experts,
        ["33 missing", "model.layers.0.mlp.experts.0.gate_proj.weight", "13 more"],
    ),
    "everything": (
        "next",
        break_everything,
        ["1 missing tensors: lm_head.weight", "stranger", CONV, NORM],
    ),
    "unknown keys": (
        "next",
        lambda folder: edit_json(folder, one=1, two=2),
        ["config.json", "'one'", "'two'"],
    ),
    "quantised": (
        "next",
        lambda folder: edit_json(folder, quantization_config=dict(bits=4)),
        ["quantization_config", "quantised weights are not read"],
    ),
    "no JSON": (
        "next",
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json is not JSON", "again"],
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken(copied, fault):
    name, change, texts = BROKEN[fault]
    folder = copied(name)
    change(folder)
    with pytest.raises(ValueError) as raised:
        models.load(folder)
    message = str(raised.value)
    assert [text for text in texts if text not in message] == []
    assert len(message) < 2500
    if fault in ("truncated file", "broken index"):
        assert "missing" not in message  # what is in it is not known


@pytest.mark.parametrize("gone", [".", "config.json", "model.safetensors"])
def test_absent(copied, gone):
    folder = copied("next")
    if gone == ".":
        shutil.rmtree(folder)
    else:
        (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)copied.*(folder|Download)"):
        models.load(folder)


def test_dtype_of_no_weights(saved):
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        models.load(saved("next")[0], dtype=jnp.int8)


# Saving


def test_a_save_that_fails_leaves_the_old_files(copied, monkeypatch):
    folder = copied("3.5 tied")
    before, write = contents(folder), files.save_file
    model, params = models.load(folder)
    calls = itertools.count()

    def fail(tensors, path, metadata):
        if next(calls) == 2:
            raise OSError("no space left")
        write(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        models.save(
            folder, model, jax.tree.map(lambda x: x + 1, params), max_shard_bytes=1
        )
    assert contents(folder) == before


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


# Meshes


def mesh_of(*names, kind=AxisType.Auto):
    shape = (1,) * (len(names) - 1) + (4,)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def test_mesh(saved):
    folder, _, params = saved("next with experts")
    _, split = models.load(folder, mesh=mesh_of("data", "model"))
    assert_same(split, params)
    layer = split["layers_0"]
    assert layer["mixer"]["in_proj"]["qkvz"]["kernel"].sharding.spec == P(None, "model")
    assert layer["mixer"]["conv_weight"].sharding.spec == P(None, None)
    assert split["embed"]["embedding"].sharding.spec == P("model", None)
    experts = layer["mlp"]["experts_gate_up"]
    assert experts.sharding.spec == P("model", None, None)
    assert {x.data.shape for x in experts.addressable_shards} == {(1, 16, 12)}
    # ten features on four devices
    assert layer["mlp"]["shared"]["gate"]["kernel"].sharding.spec == P(None, None)


def test_a_model_on_a_mesh(saved):
    folder, model, params = saved("3.5 tied")
    _, split = models.load(folder, mesh=mesh_of("model"))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    run = jax.jit(lambda params: model.apply({"params": params}, tokens))
    got, want = run(split), run(params)
    np.testing.assert_allclose(got, want, atol=1e-5 * jnp.abs(want).max())


def test_axes_of_a_mesh_of_other_names(saved):
    folder, _, params = saved("next")
    axes = dict(mlp="columns", vocab=None)
    _, split = models.load(folder, mesh=mesh_of("columns"), axes=axes)
    assert_same(split, params)
    assert split["layers_0"]["mlp"]["up"]["kernel"].sharding.spec == P(None, "columns")
    assert split["embed"]["embedding"].sharding.spec == P(None, None)


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (dict(names=("data",)), "mesh must be one with 'model'.*axes=dict"),
        (dict(names=("model",), kind=AxisType.Explicit), "of axis type Auto"),
    ],
)
def test_wrong_mesh(saved, mesh, text):
    names = mesh.pop("names")
    with pytest.raises(ValueError, match=text):
        models.load(saved("next")[0], mesh=mesh_of(*names, **mesh))


def test_only_the_part_wanted_is_read(saved):
    folder, model, params = saved("next with experts")
    targets = checkpoint.find_targets(model)
    pieces = cover.cover(files.read_folder(folder), targets, fused=False, tied=False)
    reads = []

    class Recorder:
        def __init__(self, slices):
            self.slices = slices

        def __getitem__(self, region):
            reads.append(self.slices[region])
            return reads[-1]

    path = "layers_1/mlp/experts_gate_up"
    watched = [
        dataclasses.replace(
            piece,
            tensor=dataclasses.replace(
                piece.tensor, slices=Recorder(piece.tensor.slices)
            ),
        )
        for piece in pieces[path]
    ]
    index = slice(1, 3), slice(0, 8), slice(4, 8)  # two of the gate's, two of up's
    got = cover.read(watched, targets[path], index)
    np.testing.assert_array_equal(got, flatten_dict(params, sep="/")[path][index])
    assert sum(x.size for x in reads) == got.size and len(reads) == 4


def test_progress(saved, capsys):
    folder = saved("3.5 tied")[0]
    models.load(folder)
    assert capsys.readouterr().err == ""
    models.load(folder, progress=True)
    assert "loading 3.5 tied" in capsys.readouterr().err
