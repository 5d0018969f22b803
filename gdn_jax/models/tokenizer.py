"""Text to tokens and back."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import tokenizers

from gdn_jax.models.config import Config

FILE = "tokenizer.json"
# What decoding makes of bytes that are no character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@runtime_checkable
class Tokenizer(Protocol):
    """What a loop that generates text needs; a subclass brings the first two."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str:
        """Special tokens of a tokenizer.json are left out; bytes that are no character
        become U+FFFD."""
        ...

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text that each token adds, whole characters alone, and at the end what is
        left. All of it together is what `decode` makes of the tokens."""
        # Decoded are a few tokens at a time: those since the last whole character,
        # behind those before them, since some tokenizers part words by spaces.
        before, window, shown = [], [], 0
        for token in tokens:
            window.append(token)
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


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a model's folder.

    Its tokenizer.json, or, where there is none and config.json's vocab_size is 256, one
    whose tokens are bytes.

    Raises:
      FileNotFoundError: it has neither.
      ValueError: the file is broken.
    """
    path = pathlib.Path(path)
    file = path / FILE
    if file.is_file():
        return FileTokenizer(file)
    vocab_size = Config.from_hf(path).vocab_size
    if vocab_size != ByteTokenizer.vocab_size:
        raise FileNotFoundError(
            f"no {file}, and with vocab_size {vocab_size} tokens are no bytes. "
            "Download the model's."
        )
    return ByteTokenizer()


class ByteTokenizer(Tokenizer):
    """Tokens are the bytes of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, file: pathlib.Path):
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises no other
            raise ValueError(
                f"{file} is broken ({error}). Download it again."
            ) from None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)
