"""The text of the language model: its documents, its two parts, its file."""

import json
import pathlib
import pydoc_data.topics
import sysconfig

import numpy as np
import pytest
from safetensors.numpy import save_file

from gdn_jax.training import text
from gdn_jax.training.text import SEPARATOR, Document

pytestmark = pytest.mark.once

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks/results/held_out.json"
RUN = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def corpus():
    return text.corpus()


def _texts(part):
    *texts, rest = part.decode().split(SEPARATOR.decode())
    assert rest == ""
    return texts


def test_every_kind_of_document_is_there(corpus):
    both = [*_texts(corpus.train), *_texts(corpus.held_out)]
    for start in (
        '# textwrap.py\n"""Text wrapping and filling."""\n',
        'class TextWrapper:\n    """Object for wrapping/filling text.  ',
        'def fill(text, width=70, **kwargs):\n    """Fill a single paragraph of text, ',
        'The "for" statement\n===================\n\nThe "for" statement is used ',
    ):
        assert sum(document.startswith(start) for document in both) == 1, start
    assert all(document.endswith("\n") and document[0] != "\n" for document in both)


def test_the_parts_are_apart(corpus):
    train, held_out = _texts(corpus.train), _texts(corpus.held_out)
    assert len(set(train)) == len(train) > 4000
    assert len(set(held_out)) == len(held_out) > 400
    assert not any(document.encode() in corpus.train for document in held_out)
    assert 0.08 < len(corpus.held_out) / len(corpus.train + corpus.held_out) < 0.11


def test_the_parts_share_no_passage(corpus):
    def passages(part, length=100):
        return {part[i : i + length] for i in range(len(part) - length)}

    assert len(passages(corpus.train) & passages(corpus.held_out)) < 100


def test_the_pinned_text_is_that_of_the_results(corpus):
    assert corpus.is_pinned or corpus.python != text.PINNED
    results = json.loads(RESULTS.read_text())
    assert results["python"] == text.PINNED
    for name, digest in zip(("train", "held_out"), text.PINNED_SHA256, strict=True):
        assert results[name]["sha256"] == digest


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library of our own."""

    def write(files, topics):
        always = {"textwrap.py": "", "pydoc_data/topics.py": ""}
        for name, code in (always | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, "utf-8")
        monkeypatch.setattr(pydoc_data.topics, "topics", topics)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    return write


DECODER = r'''"""  Decodes.
"""
class Decoder(Base, metaclass=Meta):
    """
    A decoder.

        Indented.
    """
    def decode(self, s: str, *, _w=None) -> str:
        "Of é."
        async def inner(): "Inner."
    def undocumented(self): pass
def end():
    "A separator: \0."
def two():
    if True:
        def within(): "After it."
'''


def test_documents_of_a_library(library):
    library(
        {
            "json/decoder.py": DECODER,
            "idlelib/help.py": '"""Left out."""',
            "json/tests/one.py": '"""Left out."""',
            "stray.py": '"""No module of the library."""',
            "abc.py": '"""First."""',
        },
        {
            "with": 'The "with" statement\n********\n\nBody.\n\n  a\n  ---\n\n'
            "Grammar\n=======\n\nNotes\n-----\n\nLast.\n",
            "if": "No title.\n",
        },
    )
    assert text.documents() == [
        Document("topic if", "No title.\n"),
        Document(
            "topic with",
            'The "with" statement\n====================\n\nBody.\n\n  a\n  ---\n',
        ),
        Document("topic with", "Notes\n=====\n\nLast.\n"),
        Document("abc", '# abc.py\n"""First."""\n'),
        Document("json", '# json/decoder.py\n"""Decodes."""\n'),
        Document(
            "json",
            "class Decoder(Base, metaclass=Meta):\n"
            '    """A decoder.\n\n        Indented.\n    """\n',
        ),
        Document(
            "json",
            'def decode(self, s: str, *, _w=None) -> str:\n    """Of é."""\n',
        ),
        Document("json", 'async def inner():\n    """Inner."""\n'),
        Document("json", 'def within():\n    """After it."""\n'),
    ]


def test_what_is_in_both_parts_is_not_held_out(library, monkeypatch):
    code = 'def close(self): "Closes."\ndef {0}(self): "Named {0}."\n'
    files = {f"{name}.py": code.format(name) for name in ("ast", "bdb", "cmd")}
    library(files, {"for": "Loops.\n", "loops": "Loops.\n"})
    monkeypatch.setattr(text, "_held_out", lambda found: {"bdb", "topic loops"})
    found = text.corpus()
    assert [document[:9] for document in _texts(found.train)] == [
        "Loops.\n",
        "def close",
        "def ast(s",
        "def cmd(s",
    ]
    assert _texts(found.held_out) == ['def bdb(self):\n    """Named bdb."""\n']


def test_sources_that_share_a_run_of_words_are_of_one_family():
    assert len(RUN.split()) == text.SHARED_WORDS
    other = RUN.replace("one", "eins")
    found = [
        Document("d", f"({RUN})."),
        Document("c", f"alone: {other[:-1]}"),
        Document("b", f"of both: {RUN.upper()} {other}"),
        Document("b", RUN.replace(" ", "\n")),
        Document("a", other),
        Document("e", RUN.removesuffix(" twelve")),
    ]
    assert text._families(found) == {"d": "a", "c": "c", "b": "a", "a": "a", "e": "e"}


def test_whole_families_are_held_out_up_to_the_share():
    """One half of the text is of one family, which is too large."""
    alone = [Document(f"alone {i}", f"{i} {i:100}") for i in range(100)]
    kin = [Document(f"kin {i}", f"{RUN} {i:39}") for i in range(100)]
    chosen = text._held_out([*alone, *kin])
    assert 15 <= len(chosen) <= 20
    assert chosen < {x.source for x in alone}
    assert chosen != {x.source for x in alone[: len(chosen)]}


def test_a_saved_text_is_loaded(tmp_path):
    given = text.Corpus(b"one\0two\0", "drei\0é".encode(), "3.99.0")
    path = tmp_path / "text"
    text.save(given, path)
    assert text.load(path) == given
    assert not given.is_pinned


def test_another_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        text.load(tmp_path / "none")
    path = tmp_path / "some"
    path.write_text("train")
    with pytest.raises(ValueError, match=r"some must be text that .* another kind"):
        text.load(path)
    for arrays in (
        dict(train=np.zeros(3, np.uint8)),
        dict(train=np.zeros(3, np.uint8), held_out=np.zeros(3, np.float32)),
    ):
        save_file(arrays, path)
        with pytest.raises(ValueError, match=r"some must be .*it has arrays .*train"):
            text.load(path)
    text.save(text.Corpus(b"first" * 9, b"second", "3.99.0"), path)
    path.write_bytes(path.read_bytes().replace(b"firstfirst", b"First,last"))
    with pytest.raises(ValueError, match="damaged"):
        text.load(path)


def test_a_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"topics.py is missing\. Save "):
        text.corpus()
