"""Tokenizers of a folder, and their streams."""

import json

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from gdn_jax.models import load_tokenizer
from gdn_jax.models.tokenizer import ByteTokenizer

TEXT = "Grüße, 世界! 👩‍🚀 «naïve» \N{REPLACEMENT CHARACTER}"
CONFIG = dict(
    model_type="qwen3_5_text",
    num_hidden_layers=1,
    hidden_size=8,
    intermediate_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
)


def byte_level(path):
    """As Qwen's: byte pairs, and special tokens that decoding leaves out."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "the world, the word"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))


def words(path):
    """Its decoder parts words by spaces."""
    vocab = dict(the=0, world=1, word=2, unknown=3)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))


def bytes_alone(path):
    (path / "config.json").write_text(json.dumps(CONFIG | dict(vocab_size=256)))


MAKERS = {"byte level": byte_level, "words": words, "bytes": bytes_alone}


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    def load(make):
        path = tmp_path_factory.mktemp("tokenizer")
        make(path)
        return load_tokenizer(path)

    return {name: load(make) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", ["byte level", "bytes"])
def test_text_and_back(loaded, name):
    tokenizer = loaded[name]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_bytes(loaded):
    assert isinstance(loaded["bytes"], ByteTokenizer)
    assert loaded["bytes"].encode("é") == [0xC3, 0xA9]
    assert loaded["bytes"].decode([0xC3, 0x41]) == "\N{REPLACEMENT CHARACTER}A"


@pytest.mark.parametrize("name", MAKERS)
def test_arrays_are_decoded_as_lists(loaded, name):
    tokenizer = loaded[name]
    tokens = tokenizer.encode("the world")
    want = tokenizer.decode(tokens)
    for kind in (tuple, np.array, jnp.array, lambda x: np.array(x, np.uint16)):
        assert tokenizer.decode(kind(tokens)) == want
        assert "".join(tokenizer.decode_stream(kind(tokens))) == want


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([1, 2**20, -1], r"tokens must be token ids in \[0, .*; got \[1048576, -1\]"),
        ([[1], [2]], r"tokens must be a list of token ids; got \[\[1\], \[2\]\]"),
        ([1.5], r"tokens must be a list of token ids; got \[1.5\]"),
        ("text", "tokens must be a list of token ids; got 'text'. Decode with"),
    ],
)
def test_what_are_no_tokens_is_told(loaded, name, tokens, told, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tokenizer = loaded[name]
    with pytest.raises(ValueError, match=told):
        tokenizer.decode(tokens)
    with pytest.raises(ValueError, match="tokens must be"):
        list(tokenizer.decode_stream(tokens))


def test_tokens_that_only_the_models_table_has_are_no_text(tmp_path):
    byte_level(tmp_path)
    alone = load_tokenizer(tmp_path)
    tokens = [*alone.encode("the"), 400]
    with pytest.raises(ValueError, match=r"got \[400\]"):
        alone.decode(tokens)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | dict(vocab_size=401)))
    assert load_tokenizer(tmp_path).decode(tokens) == "the"
    others = dict(model_type="llama", vocab_size=401, novelty=1)  # no model of ours
    (tmp_path / "config.json").write_text(json.dumps(others))
    assert load_tokenizer(tmp_path).decode(tokens) == "the"


def test_special_tokens_are_known_and_left_out(loaded):
    tokenizer = loaded["byte level"]
    tokens = tokenizer.encode("the<|endoftext|>")
    assert tokens[-1] == 0 and tokenizer.decode(tokens) == "the"


def test_a_stream_has_whole_characters(loaded):
    tokenizer = loaded["bytes"]
    parts = list(tokenizer.decode_stream(tokenizer.encode("a世b")))
    assert parts == ["a", "", "", "世", "b"]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_stream_is_the_text(loaded, name, data):
    most = dict(words=4).get(name, 255)
    tokens = data.draw(st.lists(st.integers(0, most), max_size=12))
    tokenizer = loaded[name]
    assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.decode(tokens)


@given(st.text())
def test_a_stream_shows_a_character_when_it_is_there(text):
    tokenizer, shown = ByteTokenizer(), ""
    for length, part in enumerate(tokenizer.decode_stream(text.encode()), start=1):
        shown += part
        whole = text.encode()[:length].decode(errors="ignore")
        # A real U+FFFD is like a character that has begun: it waits for the next token.
        assert shown in (whole, whole.removesuffix("\N{REPLACEMENT CHARACTER}"), text)


def test_neither(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | dict(vocab_size=300)))
    with pytest.raises(FileNotFoundError, match=r"vocab_size 300.*Download"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="Download it again"):
        load_tokenizer(tmp_path)
