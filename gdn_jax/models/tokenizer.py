"""Text to tokens and back."""

import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import tokenizers
from jax import Array

from gdn_jax.models import config_file
from gdn_jax.models.config import Config
from gdn_jax.models.config_faults import SIZE_BITS
from gdn_jax.ops import checks

TokenIds: TypeAlias = Sequence[int] | np.ndarray | Array
FILE = "tokenizer.json"
# What decoding makes of bytes that are no character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
OTHERS = "Decode with the tokenizer of the model that wrote them."


@runtime_checkable
class Tokenizer(Protocol):
    """What a loop that generates text needs; a subclass brings the first two."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: TokenIds) -> str:
        """Special tokens of a tokenizer.json are left out, and those that only the
        model's table has; bytes that are no character become U+FFFD.

        Raises:
          ValueError: tokens are no token ids, or outside the vocabulary.
        """
        ...

    def decode_stream(self, tokens: TokenIds | Iterable[int]) -> Iterator[str]:
        """The text that each token adds, whole characters alone, and at the end what is
        left. All of it together is what `decode` makes of the tokens.

        Raises:
          as `decode`.
        """
        # Decoded are a few tokens at a time: those since the last whole character,
        # behind those before them, since some tokenizers part words by spaces.
        before, window, shown = [], [], 0
        for token in tokens:
            window += token_ids("tokens", [token], sys.maxsize, OTHERS)
            text = self.decode(before + window)
            # A character that has only begun is one U+FFFD; what is before it stands.
            whole = text.removesuffix(REPLACEMENT)
            new = whole[shown:]
            yield new
            shown = len(whole)
            if new and whole == text:
                before, window = window, []
                shown = len(self.decode(before))
        if window:
            yield self.decode(before + window)[shown:]


def token_ids(
    name: str,
    tokens: Any,
    vocab_size: int,
    remedy: str = "Encode a text with the model's tokenizer.",
) -> tuple[int, ...]:
    """Of a list or an array, whatever it is.

    Raises:
      ValueError: it holds something else, or ids outside the vocabulary.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError:  # lists of several lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        checks.fail(name, repr(tokens)[:60], "a list of token ids", remedy)
    wrong = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    if wrong:
        checks.fail(name, wrong[:8], f"token ids in [0, {vocab_size})", remedy)
    return tuple(ids.tolist())


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a model's folder.

    Its tokenizer.json, or, where there is none and config.json's vocab_size is 256, one
    whose tokens are bytes.

    Raises:
      FileNotFoundError: it has neither.
      ValueError: a file is broken.
    """
    path = pathlib.Path(path)
    file, config = path / FILE, path / "config.json"
    if file.exists():
        return FileTokenizer(file, _vocab_size(config) if config.exists() else 0)
    vocab_size = Config.from_hf(path).vocab_size
    if vocab_size != ByteTokenizer.vocab_size:
        raise FileNotFoundError(
            f"no {file}, and with vocab_size {vocab_size} tokens are no bytes. "
            "Download the model's."
        )
    return ByteTokenizer()


def _vocab_size(config: pathlib.Path) -> int:
    """Of a model that need not be one of ours; 0 where it does not say."""
    size = config_file.text_of(config_file.read(config)).get("vocab_size", 0)
    if type(size) is not int or size < 0 or size >> SIZE_BITS:
        got, wanted = checks.shown(size), f"an int in [0, 2^{SIZE_BITS})"
        raise ValueError(f"{config}: vocab_size is {got}, wanted {wanted}.")
    return size


class ByteTokenizer(Tokenizer):
    """Tokens are the bytes of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: TokenIds) -> str:
        ids = token_ids("tokens", tokens, self.vocab_size, OTHERS)
        return bytes(ids).decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` package.

    Its padding and truncation are left out: they are of batches, and a file may ask for
    any length.

    vocab_size: the model's, whose table may have rows that no text is encoded to.
    """

    def __init__(self, file: pathlib.Path, vocab_size: int = 0):
        self._file = file
        if not file.is_file():  # reading a FIFO would wait for its other end
            raise ValueError(f"{file} is no file. Download it again.")
        with self._errors():
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
        own = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.vocab_size = max(vocab_size, own)

    def encode(self, text: str) -> list[int]:
        with self._errors():
            return self.tokenizer.encode(text).ids

    def decode(self, tokens: TokenIds) -> str:
        ids = token_ids("tokens", tokens, self.vocab_size, OTHERS)
        with self._errors():
            return self.tokenizer.decode(ids)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What a file says may fail only where a text comes to it."""
        try:
            yield
        except BaseException as error:
            # The package raises Exception alone, and what its Rust panics with, which
            # is none and has no public name.
            if type(error).__name__ not in ("Exception", "PanicException"):
                raise
            raise ValueError(
                f"{self._file} is broken ({checks.cut(str(error))}). Download it again."
            ) from None
