"""What is wrong with a broken checkpoint: one error that lists it."""

import shutil

import checkpoints
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from checkpoints import CONV, EMBEDDING, NORM, edit, edit_json
from safetensors.numpy import load_file, save_file

from gdn_jax import models
from gdn_jax.models import files
from gdn_jax.models.config_faults import MOST_EXPERTS

saved, copied = checkpoints.saved, checkpoints.copied


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


def claim(**fields):
    """In config.json, what is found to be untrue before anything is as large."""
    return lambda folder: edit_json(folder, **fields)


LARGEST = 2**28 - 1


def break_everything(folder):
    drop("lm_head.weight")(folder)
    put(stranger=np.ones(1))(folder)
    edit(folder, cut)


# What is wrong: the model, what is done to a copy of it, and what the text holds.
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
    "broken index": ("next", lose_the_index, [files.INDEX, "no JSON", "again"]),
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
    "the largest sizes": (
        "next",
        claim(
            vocab_size=LARGEST,
            hidden_size=LARGEST,
            intermediate_size=LARGEST,
            num_attention_heads=7,
            num_key_value_heads=7,
            head_dim=2**25,
            linear_num_key_heads=2**14,
            linear_num_value_heads=2**14,
            linear_key_head_dim=2**14 - 1,
            linear_value_head_dim=2**14 - 1,
            linear_conv_kernel_dim=32,
        ),
        [f"lm_head.weight [48, 16], wanted [{LARGEST}, {LARGEST}]"],
    ),
    "experts without end": (
        "next with experts",
        claim(num_experts=MOST_EXPERTS, moe_intermediate_size=LARGEST),
        [f"layers.0.mlp.gate.weight [4, 16], wanted [{MOST_EXPERTS}, 16]"],
    ),
    "one more expert": (
        "next with experts",
        claim(num_experts=5),
        ["9 missing tensors: model.layers.0.mlp.experts.4.down_proj.weight"],
    ),
    "a deep model": (
        "next",
        claim(layer_types=["linear_attention"] * 1000, num_hidden_layers=1000),
        [" missing tensors: ", "model.layers.100.input_layernorm.weight", "more"],
    ),
    "everything": (
        "next",
        break_everything,
        ["1 missing tensors: lm_head.weight", "stranger", CONV, NORM],
    ),
    "unknown keys": (
        "next",
        lambda folder: edit_json(folder, one=1, two=2),
        ["copied/config.json: ", "'one'", "'two'"],
    ),
    "quantised": (
        "next",
        lambda folder: edit_json(folder, quantization_config=dict(bits=4)),
        ["quantization_config", "quantised weights are not read"],
    ),
    "no JSON": (
        "next",
        lambda folder: (folder / "config.json").write_text("{"),
        ["copied/config.json is no JSON object", "again"],
    ),
    "a list": (
        "next",
        lambda folder: (folder / "config.json").write_text("[]"),
        ["config.json is no JSON object (it holds a list)", "again"],
    ),
    "ends that are text": (
        "next",
        lambda folder: edit_json(folder, "generation_config.json", eos_token_id="</s>"),
        ["copied/generation_config.json: ", "eos_token_id has '</s>', wanted int"],
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken(copied, fault, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
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
