"""What is asked of an engine, and what it has answered so far."""

import dataclasses
from collections.abc import Sequence

from gdn_jax.ops import checks


@dataclasses.dataclass
class Request:
    """A prompt and its text.

    Attributes:
      number: the engine's, counted from 0.
      prompt: token ids.
      max_tokens, temperature, top_p, top_k, seed, stop: as in `generate`.
      tokens: the text so far, token ids; a token that ended it is its last.
      log_probabilities: of each, by the model alone, whatever the options.
      finish_reason: None while it goes on; "stop", a token of `stop` came; "length",
        max_tokens; "cancelled".
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
    def limit(self) -> int:
        return len(self.prompt) + self.max_tokens

    def take(self, tokens: Sequence[int], log_probabilities: Sequence[float]) -> None:
        self.tokens += tokens
        self.log_probabilities += log_probabilities
        if self.tokens and self.tokens[-1] in self.stop:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"


def check_request(
    request: Request, vocab_size: int, num_positions: int, drafts: int, max_stop: int
) -> None:
    if not request.prompt:
        checks.fail("prompt", "no tokens", "one token at least", "Begin with some text.")
    for name, tokens in (("prompt", request.prompt), ("stop", request.stop)):
        wrong = [token for token in tokens if not 0 <= token < vocab_size]
        if wrong:
            wanted = f"token ids in [0, {vocab_size})"
            checks.fail(name, wrong[:8], wanted, "Use the model's own tokenizer.")
    if request.max_tokens < 1:
        checks.fail("max_tokens", request.max_tokens, ">= 1", "It is a count.")
    if not 0 <= request.temperature < float("inf"):
        remedy = "0 takes the most likely token."
        checks.fail("temperature", request.temperature, "finite, >= 0", remedy)
    if not 0 < request.top_p <= 1:
        checks.fail("top_p", request.top_p, "in (0, 1]", "1 is off.")
    if request.top_k < 0:
        checks.fail("top_k", request.top_k, ">= 0", "0 is off.")
    if len(request.stop) > max_stop:
        remedy = "Make the engine with a larger max_stop."
        checks.fail("stop", f"{len(request.stop)} tokens", f"<= {max_stop}", remedy)
    needed = request.limit + drafts
    if needed > num_positions:
        checks.fail(
            "prompt",
            f"{len(request.prompt)} + {request.max_tokens} new tokens + {drafts} drafts",
            f"at most num_positions = {num_positions} in all",
            "Make the engine with more, or ask for fewer tokens.",
        )
