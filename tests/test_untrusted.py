"""Configs and tokenizers by someone who wishes ill: an error each, at once."""

import json
import math

import checkpoints
import pytest
import untrusted
from checkpoints import edit_json
from untrusted import NO_JSON, bounded, refused

from gdn_jax import models
from gdn_jax.models import config_file, files, load_tokenizer

pytestmark = pytest.mark.once

saved, copied = checkpoints.saved, checkpoints.copied
unchecked = untrusted.unchecked


@pytest.mark.parametrize("fault", NO_JSON)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", files.INDEX, "tokenizer.json"]
)
def test_what_is_no_json(copied, name, fault):
    folder = copied("next")
    if name == files.INDEX:
        (folder / files.SINGLE).rename(folder / "a.safetensors")
    NO_JSON[fault](folder / name)
    with refused(folder / name, "ownload it again"):
        load_tokenizer(folder) if name == "tokenizer.json" else models.load(folder)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("config.json", config_file.MOST_BYTES),
        ("generation_config.json", config_file.MOST_BYTES),
        (files.INDEX, files.MOST_INDEX_BYTES),
    ],
)
def test_a_json_file_is_read_no_further_than_it_may_be_large(copied, name, most):
    folder = copied("next")
    (folder / files.SINGLE).unlink()
    with open(folder / name, "wb") as file:
        file.truncate(2**33)  # which takes no room on the disk
    with refused(folder / name, f"more than {most} bytes"):
        models.load(folder)


LARGE = [
    ("num_hidden_layers", 10**9, "wanted <= 1000"),
    ("num_hidden_layers", 10**400, "wanted <= 1000"),
    ("num_mtp_layers", 10**12, "wanted < 2^28"),
    ("num_mtp_layers", 2**28 - 1, "wanted 0 to 1000"),
    ("hidden_size", 2**62, "wanted < 2^28"),
    ("hidden_size", 10**400, "wanted < 2^28"),
    ("vocab_size", 2**28, "wanted < 2^28"),
    ("head_dim", 10**400, "wanted < 2^28"),
    ("head_dim", 2**27, "num_attention_heads * head_dim is 536870912, wanted < 2^28"),
    ("linear_key_head_dim", 2**27, "linear_num_key_heads * linear_key_head_dim is"),
    ("linear_value_head_dim", 2**27, "linear_num_value_heads * linear_value_head_dim"),
    ("linear_conv_kernel_dim", 2**28 - 1, "wanted <= 32"),
    ("intermediate_size", 2**31, "wanted < 2^28"),
    ("intermediate_size", -(10**400), "wanted < 2^28"),
    ("num_experts", 10**12, "wanted < 2^28"),
    ("num_experts", 10**5, "wanted 0 to 4096"),
    ("decoder_sparse_step", 2**70, "wanted < 2^28"),
    ("max_position_embeddings", 2**62, "wanted < 2^28"),
    ("rms_norm_eps", 10**400, "wanted < 2^31"),
    ("rms_norm_eps", 1e300, "wanted finite in float32"),
    ("rms_norm_eps", math.inf, "wanted finite in float32"),
    ("rms_norm_eps", math.nan, "wanted > 0"),
    ("partial_rotary_factor", -math.inf, "wanted"),
    ("eos_token_id", [2**70], "wanted < 2^28"),
    ("eos_token_id", [-1] * 10**4, "eos_token_id has 10000 entries, wanted <= 1000"),
    ("eos_token_id", [-1] * 1000, "and 980 more"),
    ("mlp_only_layers", [1] * 10**5, "100000 entries, wanted <= 1000"),
    ("layer_types", ["full_attention"] * 10**4, "10000 entries, wanted <= 1000"),
    ("layer_types", ["x" * 1000] * 2, "xx...xx"),
    ("hidden_size", "16" * 10**5, "hidden_size is '1616"),
    ("hidden_size", 16.0, "hidden_size is 16.0, wanted int"),
    ("hidden_size", [16], "hidden_size is [16], wanted int"),
    ("model_type", {}, "model_type is {}, wanted str"),
    ("model_type", "\x1b[31mred\n", r"'\x1b[31mred\n'"),
    ("\x1b[31mred\n", 1, r"unknown key '\x1b[31mred\n'"),
    ("y" * 10**5, 1, "unknown key 'yyy"),
    ("unknown", "y" * 10**5, "unknown key 'unknown' ('yyy"),
]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    LARGE,
    ids=[f"{key[:30]!a} {str(value)[:12]!a}" for key, value, _ in LARGE],
)
def test_values_that_no_model_has(copied, key, value, told):
    folder = copied("next")
    config = json.loads((folder / "config.json").read_text())
    if key == "num_hidden_layers":
        del config["layer_types"]
    if key == "num_mtp_layers":
        config = {k: x for k, x in config.items() if k not in config_file.MTP_KEYS}
    if key in config_file.ROPE_KEYS:
        del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with refused(folder / "config.json", told):
        models.load(folder)


@pytest.mark.parametrize("size", [0, -5])
def test_experts_need_one_that_all_share(copied, size):
    folder = copied("3.5 with experts")
    edit_json(folder, shared_expert_intermediate_size=size)
    told = f"shared_expert_intermediate_size is {size}, wanted >= 1"
    with refused(folder / "config.json", told):
        models.load(folder)


@pytest.mark.parametrize("name", ["config.json", files.INDEX])
def test_a_key_that_is_said_twice(copied, name):
    """Readers of JSON do not take the same one."""
    folder = copied("next")
    (folder / files.SINGLE).unlink()
    text = (
        (folder / name).read_text() if name == "config.json" else '{"weight_map": {}}'
    )
    (folder / name).write_text('{"a": 1, "a": 2,' + text.strip()[1:])
    with refused(folder / name, "it has 'a' twice"):
        models.load(folder)


def test_the_last_of_many_keys_that_is_said_twice(copied):
    """Is found in one pass over them."""
    folder, last = copied("next"), 500_000
    (folder / files.SINGLE).unlink()
    keys = ", ".join(f'"{i}": 1' for i in [*range(last), last - 1])
    (folder / files.INDEX).write_text(f"{{{keys}}}")
    with refused(folder / files.INDEX, f"it has '{last - 1}' twice"):
        models.load(folder)


def test_any_number_of_faults_is_listed_in_part(copied):
    folder = copied("next")
    edit_json(folder, **{f"key {i}": i for i in range(10**4)})
    with refused(folder / "config.json", "'key 19'", "and 9980 more"):
        models.load(folder)


def test_a_value_nested_deeply_is_shown_in_part(copied):
    folder = copied("next")
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    nested = "[" * 500 + "]" * 500
    (folder / "config.json").write_text(f'{text}, "key": {nested}}}')
    with refused(folder / "config.json", "unknown key 'key' ([[["):
        models.load(folder)


WORDS = dict(
    version="1.0",
    truncation=None,
    padding=None,
    added_tokens=[],
    normalizer=None,
    pre_tokenizer=None,
    post_processor=None,
    decoder=None,
    model=dict(type="WordLevel", vocab={"a": 0, "hello": 1}, unk_token="a"),
)


def words(**fields):
    return json.dumps(WORDS | fields).encode()


def model(kind, vocab, **fields):
    return words(model=dict(type=kind, vocab=vocab) | fields)


def split(regex):
    pattern = dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated")
    return words(pre_tokenizer=pattern | dict(invert=False))


# Some are told when the file is read, some when a text comes; some by a panic of Rust.
TOKENIZERS = {
    "an empty object": b"{}",
    "a negative id": model("WordLevel", {"a": -1}, unk_token="a"),
    "an id of 41 bits": model("WordLevel", {"a": 2**40}, unk_token="a"),
    "no word for others": model("WordLevel", {"a": 0}, unk_token="other"),
    "short merges": model("BPE", {"a": 0, "b": 1}, merges=["a b"]),
    "a long prefix": model(
        "BPE",
        {"a": 0, "b": 1, "ab": 2},
        merges=["a b"],
        continuing_subword_prefix="x" * 99,
    ),
    "no unigrams": model("Unigram", [], unk_id=0),
    "an unknown unigram": model("Unigram", [["a", 0.0]], unk_id=None),
    "a broken table": words(
        normalizer=dict(type="Precompiled", precompiled_charsmap="AAAAAA==")
    ),
    "a broken pattern": split("("),
    "a pattern without end": split("(h+)+$"),
    "an unknown template": words(
        post_processor=dict(
            type="TemplateProcessing",
            single=[dict(SpecialToken=dict(id="q", type_id=0))],
            pair=[],
            special_tokens={},
        )
    ),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_tokenizers_that_are_broken(tmp_path, fault):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(TOKENIZERS[fault])
    with refused(file, "is broken (", "Download it again"):
        load_tokenizer(tmp_path).encode("h" * 40 + "!")


def test_a_tokenizer_pads_and_cuts_nothing(tmp_path):
    """A padding of 2^40 tokens would end the process."""
    padding = dict(strategy=dict(Fixed=2**40), direction="Right", pad_id=0)
    padding |= dict(pad_type_id=0, pad_token="a", pad_to_multiple_of=None)
    cut = dict(max_length=0, stride=0, strategy="LongestFirst", direction="Right")
    (tmp_path / "tokenizer.json").write_bytes(words(padding=padding, truncation=cut))
    with bounded():
        assert load_tokenizer(tmp_path).encode("hello") == [1]


@pytest.mark.parametrize("size", [-1, 2**28, 10**400, 1.5, "5", [5], True])
def test_a_tokenizers_vocabulary_is_a_size(tmp_path, size):
    (tmp_path / "tokenizer.json").write_bytes(words())
    (tmp_path / "config.json").write_text(json.dumps(dict(vocab_size=size)))
    with refused(
        tmp_path / "config.json", "vocab_size is", "wanted an int in [0, 2^28)"
    ):
        load_tokenizer(tmp_path)
