"""Text to tokens and back."""

import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import tokenizers
from jax import Array

from gdn_jax.models import config_file
from gdn_jax.models.config import Config
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
    if file.is_file():
        return FileTokenizer(file, _vocab_size(config) if config.is_file() else 0)
    vocab_size = Config.from_hf(path).vocab_size
    if vocab_size != ByteTokenizer.vocab_size:
        raise FileNotFoundError(
            f"no {file}, and with vocab_size {vocab_size} tokens are no bytes. "
            "Download the model's."
        )
    return ByteTokenizer()


def _vocab_size(config: pathlib.Path) -> int:
    """Of a model that need not be one of ours; 0 where it does not say."""
    size = config_file.text_of(config_file.read(config)).get("vocab_size")
    return size if isinstance(size, int) else 0


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

    vocab_size: the model's, whose table may have rows that no text is encoded to.
    """

    def __init__(self, file: pathlib.Path, vocab_size: int = 0):
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises no other
            raise ValueError(
                f"{file} is broken ({error}). Download it again."
            ) from None
        own = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.vocab_size = max(vocab_size, own)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: TokenIds) -> str:
        ids = token_ids("tokens", tokens, self.vocab_size, OTHERS)
        return self.tokenizer.decode(ids)
