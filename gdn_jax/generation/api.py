"""`generate`: prompts to texts in one call."""

from __future__ import annotations  # so that help() names types and expands none

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gdn_jax.generation.engine import Engine
from gdn_jax.generation.interrupts import Interrupts
from gdn_jax.generation.requests import TokenIds, check_length, token_ids
from gdn_jax.generation.sizes import integer, power_of_two
from gdn_jax.models.sharded import AnyModel, check_params, groups_of
from gdn_jax.ops import checks

MOST_ROWS = 64
# Sizes of an engine that like calls share, and with them their compilations.
POSITIONS_STEP = 256  # its positions are a multiple of it
LEAST_STOP = 4  # tokens that it has room for in a request's `stop`

OnTokens = Callable[[int, list[int]], Any]


class Result(NamedTuple):
    """What `generate(..., details=True)` gives for a prompt.

    Attributes:
      tokens: the text, token ids; a token that ended it is its last.
      log_probabilities: of each, by the model alone, whatever the options.
      finish_reason: "stop", a token of `stop` came; "length", max_tokens; "nan", the
        model's logits are no numbers, and the text ends before them.
    """

    tokens: list[int]
    log_probabilities: list[float]
    finish_reason: str


def generate(
    model: AnyModel,
    params: Any,
    prompts: Sequence[TokenIds],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    speculative: int = 0,
    decode: str | None = None,
    seed: int = 0,
    stop: TokenIds | None = None,
    num_rows: int | None = None,
    on_tokens: OnTokens | None = None,
    details: bool = False,
) -> list[list[int]] | list[Result]:
    """The texts that a model writes behind some prompts.

        >>> from gdn_jax import generate, models
        >>> model, params = models.load(models.SMALL, progress=False)
        >>> tokenizer = models.load_tokenizer(models.SMALL)
        >>> prompt = tokenizer.encode("def main(")
        >>> [text] = generate(model, params, [prompt], max_tokens=8)
        >>> len(text), type(tokenizer.decode(text))
        (8, <class 'str'>)

    A text depends on its prompt, the options, `seed` and the prompt's index, not on the
    other prompts, up to rounding: batches of other sizes may add up in other orders,
    which can decide between tokens that are all but equally likely.

    Ctrl-C waits for the end of the device's call at hand, of 16 steps at most, and of
    `on_tokens` with what it gave, and then raises KeyboardInterrupt. To go on
    after it, or after a crash, run an `Engine`, which can be saved.

    Args:
      model, params: as `models.load` or `models.load_sharded` gives them.
      prompts: token ids, a sequence for each.
      max_tokens: most new tokens of each text.
      temperature: 0 takes the most likely token; otherwise of the softmax.
      top_p: in (0, 1]; sample only from the most likely tokens that have this share.
      top_k: sample only from so many; 0: from all.
      speculative: tokens that the multi-token prediction head drafts a step, 8 at
        most, which then cost fewer steps: the same texts at temperature 0, up to
        rounding, and texts of the same distribution otherwise. 0: none.
      decode: "in_place", "checkpoints" or "replay", see `Engine`. None: the fastest
        that was measured for so many rows on this GPU; elsewhere in place, or with
        drafts by checkpoints.
      seed: any int; each prompt draws with a key of seed and index.
      stop: tokens that end a text; None: the config's `eos_token_id`; (): none.
      num_rows: prompts at once; the others wait. None: all, but 64 at most.
      on_tokens: called with a prompt's index and its new tokens, as they come.
      details: whether to return a `Result` for each prompt.

    Returns:
      Each prompt's new tokens, or a `Result` of them.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      MemoryError: the device has no room; the text says what to reduce.
    """
    check_params(model, params)
    config = model.config
    prompts = [
        token_ids(f"prompts[{i}]", prompt, config.vocab_size)
        for i, prompt in enumerate(_as_prompts(prompts))
    ]
    if on_tokens is not None and not callable(on_tokens):
        remedy = "It is called with a prompt's index and its new tokens."
        checks.fail("on_tokens", repr(on_tokens), "a function or None", remedy)
    for i, prompt in enumerate(prompts):
        if not prompt:
            wanted, remedy = "one token at least", "Begin with some text."
            checks.fail(f"prompts[{i}]", "no tokens", wanted, remedy)
    checks.count("max_tokens", max_tokens, "It is a count of new tokens.")
    drafts, seed = integer("speculative", speculative), integer("seed", seed)
    if not prompts:
        return []
    engine = make_engine(
        model,
        params,
        prompts,
        max_tokens=max_tokens,
        drafts=drafts,
        decode=decode,
        stop=stop,
        num_rows=num_rows,
    )
    requests = [
        engine.submit(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=prompt_seed(seed, i),
            stop=stop,
        )
        for i, prompt in enumerate(prompts)
    ]
    given = [0] * len(requests)
    interrupts = Interrupts()
    while engine.requests:
        with interrupts:
            for request in engine.step():
                new = request.tokens[given[request.number] :]
                given[request.number] += len(new)
                if on_tokens is not None:
                    on_tokens(request.number, new)
        interrupts.deliver()
    if not details:
        return [request.tokens for request in requests]
    return [
        Result(request.tokens, request.log_probabilities, str(request.finish_reason))
        for request in requests
    ]


def _as_prompts(prompts: Any) -> Sequence[TokenIds]:
    """One prompt alone, as ids or as text, is a common mistake."""
    is_many = isinstance(prompts, Iterable) and not isinstance(prompts, str)
    prompts = list(prompts) if is_many else [prompts]
    is_one = not is_many or any(np.ndim(prompt) == 0 for prompt in prompts)
    if is_one:
        remedy = "Encode each text with the model's tokenizer; give one as [ids]."
        got = repr(prompts if is_many else prompts[0])[:60]
        checks.fail("prompts", got, "a list of lists of token ids", remedy)
    return prompts


def make_engine(
    model: AnyModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    drafts: int,
    decode: str | None = None,
    stop: TokenIds | None = None,
    num_rows: int | None = None,
) -> Engine:
    """With room for some prompts, one at least, and what `generate` is asked of them.

    Its sizes are rounded up, so that calls of like sizes share their compilations.
    """
    for i, prompt in enumerate(prompts):  # before there is an engine for its length
        check_length(f"prompts[{i}]", len(prompt), max_tokens, model.config)
    longest = max(map(len, prompts)) + max_tokens + drafts
    if num_rows is None:
        num_rows = min(power_of_two(len(prompts)), MOST_ROWS)
        groups = groups_of(model)
        num_rows = -(-num_rows // groups) * groups
    ends = model.config.eos_token_id
    if stop is not None:
        ends = token_ids("stop", stop, model.config.vocab_size)
    return Engine(
        model,
        params,
        num_rows=num_rows,
        num_positions=-(-longest // POSITIONS_STEP) * POSITIONS_STEP,
        speculative=drafts,
        decode=decode,
        max_stop=max(LEAST_STOP, len(ends)),
    )


def prompt_seed(seed: int, index: int) -> int:
    """Of the request that `generate` makes of a prompt: 64 bits, hashed of both."""
    mixed = np.random.SeedSequence(seed % 2**64, spawn_key=(index,))
    return int(mixed.generate_state(1, np.uint64)[0])
