"""What is read from config.json, and what is refused."""

import dataclasses
import json
import math

import jaxtyping
import pytest

from gdn_jax.models import Config

DENSE = dict(
    model_type="qwen3_5_text",
    vocab_size=50,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
)
LINEAR, FULL = "linear_attention", "full_attention"
CONFIGS = [
    Config(layer_types=(LINEAR, FULL), **DENSE),
    Config(
        model_type="qwen3_next",
        vocab_size=99,
        hidden_size=32,
        layer_types=(FULL, LINEAR, LINEAR),
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=24,
        linear_value_head_dim=20,
        linear_conv_kernel_dim=3,
        intermediate_size=48,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=14,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=(1,),
        rope_theta=1e7,
        partial_rotary_factor=0.5,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        num_mtp_layers=2,
        eos_token_id=(3, 5),
    ),
]


def read(**changes):
    """DENSE of eight layers, changed; a change to None takes the key out."""
    file = dict(DENSE, num_hidden_layers=8) | changes
    return Config.from_hf({key: x for key, x in file.items() if x is not None})


def test_every_field_is_tried():
    _, other = CONFIGS
    for field in dataclasses.fields(Config):
        assert getattr(other, field.name) != field.default


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_is_written_is_read(config, tmp_path):
    text = json.dumps(config.to_hf())
    assert Config.from_hf(json.loads(text)) == config
    (tmp_path / "config.json").write_text(text)
    assert Config.from_hf(tmp_path) == config
    assert Config.from_hf(str(tmp_path / "config.json")) == config


def test_a_multimodal_file_has_it_one_level_down():
    [config, _] = CONFIGS
    outer = dict(
        model_type="qwen3_5",
        architectures=["Qwen3_5ForConditionalGeneration"],
        image_token_id=7,
        vision_config=dict(depth=3),
        tie_word_embeddings=True,
        text_config=config.to_hf(),
    )
    wanted = dataclasses.replace(config, tie_word_embeddings=True)
    assert Config.from_hf(outer) == wanted


def test_attention_is_every_fourth_layer_unless_the_file_says():
    assert read().layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2
    assert read(full_attention_interval=2).layer_types == (LINEAR, FULL) * 4
    types = [FULL] * 8
    assert read(full_attention_interval=2, layer_types=types).layer_types == (FULL,) * 8


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope_theta=1e6, partial_rotary_factor=0.5, rope_scaling=None),
        dict(rope_parameters=dict(rope_theta=1e6, partial_rotary_factor=0.5)),
        dict(
            rope_parameters=dict(
                rope_type="default",
                rope_theta=1e6,
                mrope_section=[11, 11, 10],
                mrope_interleaved=True,
            ),
            partial_rotary_factor=0.5,
        ),
    ],
    ids=["old place", "new place", "both"],
)
def test_rope_has_two_places(keys):
    config = read(head_dim=32, **keys)
    assert (config.rope_theta, config.rotary_dim) == (1e6, 16)


MTP = ["num_mtp_layers", "mtp_num_hidden_layers", "num_nextn_predict_layers"]


@pytest.mark.parametrize("key", MTP)
def test_the_number_of_mtp_layers_has_three_names(key):
    assert read(**{key: 1}, mtp_layer_types=[FULL]).num_mtp_layers == 1


def test_each_reader_finds_its_name_of_the_number_of_mtp_layers():
    none, two = (config.to_hf() for config in CONFIGS)
    assert [none.get(key) for key in MTP] == [0, None, None]
    assert [two[key] for key in MTP] == [2, 2, 2]


def test_names_of_the_number_of_mtp_layers_must_agree():
    _, written = (config.to_hf() for config in CONFIGS)
    told = "num_mtp_layers is 2, mtp_num_hidden_layers is 1, num_nextn_predict_layers"
    with pytest.raises(ValueError, match=told):
        Config.from_hf(written | dict(mtp_num_hidden_layers=1))
    with pytest.raises(ValueError, match="num_mtp_layers is 0, mtp_num_hidden_layers"):
        read(num_mtp_layers=0, mtp_num_hidden_layers=1)


def test_a_null_is_as_if_it_were_not_there():
    nulls = dict(
        full_attention_interval=None,
        num_nextn_predict_layers=None,
        attention_bias=None,
    )
    written = CONFIGS[0].to_hf()
    assert Config.from_hf(written | nulls) == CONFIGS[0]
    with pytest.raises(ValueError, match="unknown key 'novelty'"):
        Config.from_hf(written | dict(novelty=None))


def test_one_end_of_text_or_several():
    assert read(eos_token_id=4).eos_token_id == (4,)
    assert read(eos_token_id=[4, 6]).eos_token_id == (4, 6)
    assert read().eos_token_id == ()


def test_sparse_layers():
    _, other = CONFIGS
    assert [other.is_sparse(i) for i in range(4)] == [False, False, False, True]
    assert not CONFIGS[0].is_sparse(3)


def test_every_fault_of_a_file_is_in_one_error():
    with pytest.raises(ValueError) as caught:
        read(
            sliding_window=4096,
            logit_softcap=30.0,
            attention_bias=True,
            hidden_act="gelu",
            vocab_size=None,
            layer_types=[FULL],
            mtp_layer_types=[LINEAR],
            num_mtp_layers=1,
            mtp_num_hidden_layers=2,
            rope_parameters=dict(rope_type="yarn", factor=4.0),
            head_dim="64",
            num_attention_heads=3,
            num_key_value_heads=2,
            eos_token_id="</s>",
        )
    told = str(caught.value)
    for part in (
        "unknown key 'sliding_window' (4096)",
        "unknown key 'logit_softcap' (30.0)",
        "attention_bias is True, only False is built",
        "hidden_act is 'gelu'",
        "vocab_size is missing",
        "num_hidden_layers is 8, layer_types has 1",
        "mtp_layer_types has 'linear_attention'",
        "num_mtp_layers is 1, mtp_num_hidden_layers is 2, but all are the",
        "rope_type is 'yarn'",
        "unknown key 'factor' of rope_parameters",
        "head_dim is '64', wanted int",
        "num_attention_heads is 3, wanted a multiple of num_key_value_heads = 2",
        "eos_token_id has '</s>', wanted int",
    ):
        assert part in told
    assert "partial_rotary_factor" not in told  # of what head_dim is not known


def test_a_fault_is_told_of_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DENSE | dict(num_hidden_layers=2, head_dim=0)))
    for source in (tmp_path, path):
        with pytest.raises(ValueError) as caught:
            Config.from_hf(source)
        assert str(caught.value).startswith(f"{path}: head_dim is 0, wanted > 0. ")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(model_type="llama"), "model_type is 'llama', wanted one of qwen3_next"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0, wanted an int >= 1"),
        (dict(num_hidden_layers="4"), "num_hidden_layers is '4', wanted an int >= 1"),
        (dict(full_attention_interval=0), "full_attention_interval is 0, wanted an"),
        (dict(layer_types=[], num_hidden_layers=None), "layer_types is empty"),
        (dict(layer_types=5), "layer_types has 5, wanted str"),
        (dict(num_hidden_layers=None), "json: num_hidden_layers is missing. This"),
        (dict(num_hidden_layers=0), "wanted an int >= 1. This"),
        (dict(mlp_only_layers=[1, "2"]), "mlp_only_layers has '2', wanted int"),
        (dict(eos_token_id="</s>"), "eos_token_id has '</s>', wanted int"),
        (dict(eos_token_id=[2, None]), "eos_token_id has None, wanted int"),
        (dict(eos_token_id=[True]), "eos_token_id has True, wanted int"),
        (dict(eos_token_id=-1), "eos_token_id has -1, wanted >= 0"),
        (dict(rope_theta=0), "rope_theta is 0, wanted > 0"),
        (dict(rope_theta=math.nan), "rope_theta is nan, wanted > 0"),
        (dict(intermediate_size=-3), "intermediate_size is -3, but layers"),
        (
            dict(num_experts=4, num_experts_per_tok=2),
            "moe_intermediate_size is 0, wanted >= 1 where there are experts",
        ),
        (dict(num_experts=-4), "num_experts is -4, wanted 0 to 4096"),
        (dict(num_mtp_layers=[1]), r"num_mtp_layers is \[1\], wanted an int >= 0"),
        (
            dict(num_mtp_layers="1", mtp_num_hidden_layers=1),
            "num_mtp_layers is '1', wanted an int >= 0. This",
        ),
        (dict(mtp_layer_types=5), "mtp_layer_types has 5, only 'full_attention'"),
        (dict(rope_parameters=1e4), "rope_parameters is 10000.0, wanted an object"),
        (dict(text_config=5), r"unknown key 'text_config' \(5\)"),
        (dict(hidden_size="64"), "hidden_size is '64', wanted int"),
        (dict(vocab_size=True), "vocab_size is True, wanted int"),
        (dict(head_dim=0), "head_dim is 0, wanted > 0"),
        (
            dict(num_attention_heads=3, num_key_value_heads=2),
            "num_attention_heads is 3, wanted a multiple of num_key_value_heads = 2",
        ),
        (
            dict(linear_num_value_heads=3, linear_num_key_heads=2),
            "linear_num_value_heads is 3, wanted a multiple of linear_num_key_heads",
        ),
        (
            dict(head_dim=6, partial_rotary_factor=0.5),
            "partial_rotary_factor is 0.5, wanted an even part of head_dim = 6",
        ),
        (dict(partial_rotary_factor=-0.5), "is -0.5, wanted an even part of head_dim"),
        (dict(partial_rotary_factor=float("nan")), "is nan, wanted an even part of"),
        (dict(layer_types=["sliding_attention"] * 8), "'sliding_attention', wanted"),
        (dict(intermediate_size=0), r"layers \[0, 1, 2, 3, 4, 5, 6, 7\] have no"),
        (dict(num_experts=4, num_experts_per_tok=5), "is 5, wanted 1 to num_exp"),
        (dict(num_experts=4, num_experts_per_tok=0), "is 0, wanted 1 to num_exp"),
        (dict(num_experts=4, decoder_sparse_step=0), "decoder_sparse_step is 0"),
        (dict(model_type="qwen3_next"), "num_experts is missing"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_model_that_cannot_be_is_refused(changes, told, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=told):
        read(**changes)


def test_only_dense_layers_need_their_width():
    experts = dict(num_experts=4, num_experts_per_tok=2, intermediate_size=0)
    experts |= dict(moe_intermediate_size=8, shared_expert_intermediate_size=8)
    assert read(**experts).is_sparse(0)
    with pytest.raises(ValueError, match=r"layers \[2\] have no experts"):
        read(**experts, mlp_only_layers=[2])
