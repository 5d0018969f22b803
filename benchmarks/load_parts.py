"""What a loaded engine is asked, and what is to come back."""

import dataclasses
import pathlib
import random
from typing import Any, NamedTuple

import jax

import gdn_jax
from gdn_jax import Engine, models
from gdn_jax.generation.requests import Request


class Asked(NamedTuple):
    prompt: list[int]
    max_tokens: int
    stop: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Load:
    """How many prompts, of how many tokens at most, for texts of how many at most; on
    so many rows of an engine, with drafts and decode as `Engine` has them; by the
    model that is in a folder, of None by the shipped one."""

    count: int
    rows: int
    drafts: int = 0
    decode: str | None = None
    prompt: int = 160
    new: int = 48
    folder: str | None = None


class Text(NamedTuple):
    """Compared bit for bit, log-probabilities too."""

    tokens: list[int]
    log_probabilities: list[float]
    finish_reason: str | None


def make_asked(load: Load) -> list[Asked]:
    """The same ones always, of one version of the package; most prompts are short."""
    root = pathlib.Path(gdn_jax.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    rng = random.Random(0)
    asked = []
    for i in range(load.count):
        length = min(max(1, round(rng.lognormvariate(3.5, 0.9))), load.prompt)
        begin = rng.randrange(len(text) - length)
        stop = tuple(b"\n") if i % 3 == 0 else ()
        prompt = list(text[begin : begin + length])
        asked.append(Asked(prompt, rng.randint(1, load.new), stop))
    return asked


def load_model(load: Load) -> tuple[models.Model, Any]:
    """In its own dtype on a GPU, in the CPU's there."""
    dtype = "float32" if jax.default_backend() == "cpu" else None
    return models.load(load.folder or models.SMALL, dtype=dtype, progress=False)


def make_engine(model: models.Model, params: Any, load: Load) -> Engine:
    """Whose calls are of the same shapes however many requests there are."""
    return Engine(
        model,
        params,
        num_rows=load.rows,
        num_positions=load.prompt + load.new + load.drafts,
        speculative=load.drafts,
        decode=load.decode,
        prefill_tokens=16,
    )


def submit(engine: Engine, asked: Asked) -> Request:
    return engine.submit(asked.prompt, max_tokens=asked.max_tokens, stop=asked.stop)


def text_of(request: Request) -> Text:
    return Text(request.tokens, request.log_probabilities, request.finish_reason)


def cut(text: Text, asked: Asked) -> Text:
    """Of the longest text the part that was asked for, whose steps are the same."""
    tokens = text.tokens[: asked.max_tokens]
    ends = [i for i, token in enumerate(tokens) if token in asked.stop]
    count, reason = (ends[0] + 1, "stop") if ends else (len(tokens), "length")
    return Text(tokens[:count], text.log_probabilities[:count], reason)
