"""What is asked of an engine, and what it has answered so far."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gdn_jax.generation.sizes import Sizes, integer
from gdn_jax.models.config import Config
from gdn_jax.models.tokenizer import TokenIds as TokenIds
from gdn_jax.models.tokenizer import token_ids
from gdn_jax.ops import checks


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its text; the options of `Engine.submit` are under their names.

    Attributes:
      number: the engine's, counted from 0.
      prompt: token ids.
      tokens: the text so far, token ids; a token that ended it is its last.
      log_probabilities: of each, by the model alone, whatever the options.
      finish_reason: None while it goes on; "stop", a token of `stop` came; "length",
        max_tokens; "cancelled"; "nan", the model's logits are no numbers, of which no
        token is kept.
      prefilled: tokens of the prompt that the model has read.
      row: of the engine's state; None while it waits and once it is finished.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[int, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    prefilled: int = 0
    row: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def limit(self) -> int:
        """Tokens of prompt and text at most."""
        return len(self.prompt) + self.max_tokens

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the model has yet to read."""
        return len(self.prompt) - self.prefilled

    def take(self, tokens: Sequence[int], log_probabilities: Sequence[float]) -> None:
        known = [not math.isnan(x) for x in log_probabilities]
        count = known.index(False) if False in known else len(known)
        self.tokens += tokens[:count]
        self.log_probabilities += log_probabilities[:count]
        if count < len(known):
            self.finish_reason = "nan"
        elif self.tokens and self.tokens[-1] in self.stop:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"


@dataclasses.dataclass
class Figures:
    """What an engine has done since it was made.

    Attributes:
      prefilled: tokens of prompts.
      decoded: tokens of texts, but each one's first.
      steps: decoding steps.
      accepted, row_steps: tokens that whole steps of single rows gave, and how many.
    """

    prefilled: int = 0
    decoded: int = 0
    steps: int = 0
    accepted: int = 0
    row_steps: int = 0

    @property
    def mean_accepted(self) -> float:
        """Tokens a row gains by a step: 1 without drafts."""
        return self.accepted / self.row_steps if self.row_steps else 1.0


def _number(name: str, x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError):
        checks.fail(name, checks.shown(x), "a number", "Convert it first.")
        raise


def make_request(
    number: int,
    *,
    prompt: Any,
    max_tokens: Any,
    temperature: Any,
    top_p: Any,
    top_k: Any,
    seed: Any,
    stop: Any,
    config: Config,
    sizes: Sizes,
) -> Request:
    """Of what `Engine.submit` was given, whatever that is.

    Raises:
      ValueError: it is wrong, or longer than the model has learned or than the engine
        has room for.
    """
    checks.count("max_tokens", max_tokens, "It is a count of new tokens.")
    request = Request(
        number,
        prompt=token_ids("prompt", prompt, config.vocab_size),
        max_tokens=integer("max_tokens", max_tokens),
        temperature=_number("temperature", temperature),
        top_p=_number("top_p", top_p),
        top_k=integer("top_k", top_k),
        seed=integer("seed", seed),
        stop=tuple(dict.fromkeys(token_ids("stop", stop, config.vocab_size))),
    )
    if not request.prompt:
        wanted, remedy = "one token at least", "Begin with some text."
        checks.fail("prompt", "no tokens", wanted, remedy)
    if request.max_tokens >= 2**31:
        checks.fail("max_tokens", max_tokens, "in [1, 2^31)", "It is an int32.")
    if not 0 <= request.temperature <= float(np.finfo(np.float32).max):
        remedy = "0 takes the most likely token."
        checks.fail("temperature", temperature, "finite in float32, >= 0", remedy)
    if not 0 < request.top_p <= 1:
        checks.fail("top_p", top_p, "in (0, 1]", "1 is off.")
    if not 0 <= request.top_k < 2**31:
        checks.fail("top_k", top_k, "in [0, 2^31)", "0 is off.")
    check_length("prompt", len(request.prompt), request.max_tokens, config)
    _check_room(request, sizes)
    return request


def check_length(name: str, num_tokens: int, max_tokens: int, config: Config) -> None:
    """Of a prompt and its text: attention has learned so many positions, the recurrent
    layers know of none."""
    most = config.max_position_embeddings
    if "full_attention" in config.layer_types and num_tokens + max_tokens > most:
        got = f"{num_tokens} tokens, with {max_tokens} new ones"
        wanted = f"at most max_position_embeddings = {most} tokens in all"
        remedy = "Shorten it, or ask for fewer tokens: the model has learned no more."
        checks.fail(name, got, wanted, remedy)


def _check_room(request: Request, sizes: Sizes) -> None:
    if len(request.stop) > sizes.max_stop:
        wanted = f"at most max_stop = {sizes.max_stop}"
        remedy = "Make the engine with a larger one."
        checks.fail("stop", f"{len(request.stop)} tokens", wanted, remedy)
    if request.limit + sizes.speculative > sizes.num_positions:
        got = (
            f"{len(request.prompt)} tokens, with {request.max_tokens} new ones and "
            f"{sizes.speculative} drafts"
        )
        wanted = f"at most num_positions = {sizes.num_positions} in all"
        remedy = "Make the engine with more, or ask for fewer tokens."
        checks.fail("prompt", got, wanted, remedy)
