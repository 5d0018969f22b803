'''The text that every Python ships: its language reference, and the docstrings of its
standard library.

A document is a module's, a class's or a function's docstring under its name, whatever
it is nested in:

    def fill(text, width=70, **kwargs):
        """Fill a single paragraph of text, returning a new string.
        ...
        """

(`class TextWrapper:`; `# textwrap.py` for a module), or a section of one of pydoc's
topics under its title:

    The "for" statement
    ===================

    The "for" statement is used to iterate over the elements of a sequence ...

Each begins at column 0, so that `def `, `class `, `# ` and a title's words prompt a
whole one. They follow each other in the order of their sources, each ended by
`SEPARATOR`, which occurs nowhere else and so tells a model that a text is over.
'''

import ast
import collections
import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gdn_jax import _trees
from gdn_jax.ops import checks

SEPARATOR = b"\0"
HELD_OUT = 0.1  # share of the bytes, at most

# The Python whose text the published figures are of; other versions' differ a bit.
PINNED = "3.12.1"
PINNED_SHA256 = (
    "d99bdf0609134344e02d77718c6615214943a44f60482bd67a0e75c254087f90",
    "0dc89dcd20482e2d959a1266a8945838e2e86f4ecd41bc7ce9005b92e24510ff",
)

# No prose, or not in every installation of a Python.
LEFT_OUT = {
    "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "pydoc_data", "test",
    "tests", "tkinter", "turtle", "turtledemo", "venv",
}  # fmt: skip

# Sources that have as many words in a row in common are of one family.
SHARED_WORDS = 12

_TITLE = re.compile(r"(?:\A|(?<=\n\n))(\S.*)\n([*=\-~^])\2+\n")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Document(NamedTuple):
    """`source` is the topic or the top-level module or package that it is of."""

    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both parts are UTF-8; `python` is the version whose text it is."""

    train: bytes = dataclasses.field(repr=False)
    held_out: bytes = dataclasses.field(repr=False)
    python: str

    @property
    def sha256(self) -> tuple[str, str]:
        """Of train and held_out."""
        return _sha256(self.train), _sha256(self.held_out)

    @property
    def is_pinned(self) -> bool:
        """Whether it is the text that the published figures are of."""
        return self.sha256 == PINNED_SHA256


def corpus() -> Corpus:
    """The text of the Python that runs, split in two.

    Families of sources, which share passages, are held out whole, chosen by a hash of
    their names. A document that occurs twice stands once; one that occurs in the
    training text is not held out.

    Raises:
      FileNotFoundError: this Python came without its sources.
    """
    found = documents()
    held_out = _held_out(found)
    train = _join(x.text for x in found if x.source not in held_out)
    rest = (x.text for x in found if x.source in held_out)
    return Corpus(
        train,
        _join(text for text in rest if text.encode() not in train),
        platform.python_version(),
    )


def documents() -> list[Document]:
    """All of them, with their duplicates, in the order of their sources.

    Raises:
      FileNotFoundError: this Python came without its sources.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for name in ("pydoc_data/topics.py", "textwrap.py"):
        if not (root / name).exists():
            raise FileNotFoundError(
                f"The text is that of Python's own sources; {root / name} is missing. "
                f"Save the text with gdn_jax.training.text.save where they are, and "
                f"load it here."
            )
    return [*_sections(), *_docstrings(root)]


def save(corpus: Corpus, path: str | os.PathLike[str]) -> None:
    """To a safetensors file, for a machine with another Python."""
    parts = dict(train=corpus.train, held_out=corpus.held_out)
    notes = dict(python=corpus.python, sha256=corpus.sha256)
    arrays = {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}
    _trees.save(pathlib.Path(path), arrays, notes)


def load(path: str | os.PathLike[str]) -> Corpus:
    """What `save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not one of `save`'s, or damaged.
    """
    path = pathlib.Path(path)
    path.stat()  # of no file it says so in the system's words
    wanted = "text that gdn_jax.training.text.save wrote"
    remedy = "Write it anew."
    try:
        notes = _trees.load_notes(path)
        with _trees.opened(path) as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, it is no mapping
            if types != dict(train="U8", held_out="U8"):
                raise ValueError(f"it has arrays {checks.listed(sorted(types))}")
            parts = {name: file.get_tensor(name).tobytes() for name in types}
    except ValueError as error:
        checks.fail(str(path), f"another kind of file ({error})", wanted, remedy)
        raise
    corpus = Corpus(**parts, python=str(notes.get("python")))
    if list(corpus.sha256) != notes.get("sha256"):
        raise ValueError(f"{path} is damaged. {remedy}")
    return corpus


def _sections() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        source = f"topic {name}"
        # what precedes the first title, then title, underline's letter and body of each
        start, *parts = _TITLE.split(topics[name])
        if start.strip():
            yield Document(source, f"{start.strip()}\n")
        for title, body in zip(parts[::3], parts[2::3], strict=True):
            if body.strip():
                line = "=" * len(title)
                yield Document(source, f"{title}\n{line}\n\n{body.strip()}\n")


def _docstrings(root: pathlib.Path) -> Iterator[Document]:
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        modules = name.removesuffix(".py").split("/")
        if modules[0] not in sys.stdlib_module_names or LEFT_OUT & set(modules):
            continue
        tree = ast.parse(paths[name].read_bytes())
        if doc := _docstring(tree):
            yield Document(modules[0], f"# {name}\n{doc}\n")
        for node in _definitions(tree):
            if doc := _docstring(node):
                body = textwrap.indent(doc, 4 * " ")
                yield Document(modules[0], f"{_signature(node)}\n{body}\n")


def _definitions(node: ast.AST) -> Iterator:
    """Classes and functions in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield child
        if not isinstance(child, ast.expr):
            yield from _definitions(child)


def _docstring(node) -> str:
    """In its quotes; those that end several lines have a line to themselves."""
    doc = (ast.get_docstring(node) or "").rstrip()
    if not doc or SEPARATOR.decode() in doc:
        return ""
    return f'"""{doc}\n"""' if "\n" in doc else f'"""{doc}"""'


def _signature(node) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(x) for x in (*node.bases, *node.keywords))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){returns}:"


def _held_out(found: list[Document]) -> set[str]:
    """The sources of some families: in the order of their names' hashes, each that
    still fits into the share."""
    family, sizes = _families(found), collections.Counter[str]()
    for source, text in found:
        sizes[family[source]] += len(text.encode())
    room, chosen = HELD_OUT * sizes.total(), set()
    for name in sorted(sizes, key=lambda name: _sha256(name.encode())):
        if sizes[name] <= room:
            room -= sizes[name]
            chosen.add(name)
    return {source for source in family if family[source] in chosen}


def _families(found: list[Document]) -> dict[str, str]:
    """Each source's family, named after its least member: sources that share a run of
    words are of one, and so are those that share runs with a third."""
    family = {x.source: x.source for x in found}

    def root(source: str) -> str:
        return source if family[source] == source else root(family[source])

    first: dict[tuple[str, ...], str] = {}
    for source, text in found:
        words = re.findall(r"\w+", text)
        for run in zip(*(words[i:] for i in range(SHARED_WORDS)), strict=False):
            other = first.setdefault(run, source)
            if other != source:
                one, two = sorted((root(source), root(other)))
                family[two] = one
    return {source: root(source) for source in family}


def _join(texts: Iterable[str]) -> bytes:
    return b"".join(text.encode() + SEPARATOR for text in dict.fromkeys(texts))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
