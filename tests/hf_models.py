"""transformers' models as ours, compared call by call. Needs no torch.

A folder (make_model_goldens.py makes them) is a checkpoint with a record.npz beside it:

    tokens             [1, L] a prompt and what was decoded greedily behind it
    prompt             the prompt's length
    logits             [1, L, vocab] behind each token, the prompt's from one call
    modules/<name>     [1, kept, D] what the embedding, the layers and the last norm
                       gave for the prompt's last tokens
    mtp/first, second  [1, kept, vocab] logits of a draft and of another one behind it,
                       at the prompt's last tokens that have so many behind them
    mtp/drafts, chain  [1, drafts], [1, 1 + drafts, vocab] drafts behind the prompt,
                       each the most likely of the last one's logits
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax import models, testing

# Relative RMS of float32 against float32, through all layers.
TOLERANCE = 5e-5
PIECE = 40  # tokens of a padded piece of the prompt
ACCEPTED = (1, 3, 2, 4)  # tokens of speculative steps that stand, in turns


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint's model, ready to be called, and its record.

    Attributes:
      call: `model.apply` with the parameters, jitted.
      prompt: tokens of the prompt.
      tokens: [1, L], those of the record.
    """

    model: models.Model
    call: Callable[..., Any]
    record: dict[str, np.ndarray]
    prompt: int
    tokens: jax.Array

    def new_state(self, drafts: int = 0) -> models.ModelState:
        return self.model.init_state(1, self.tokens.shape[1] + drafts, drafts=drafts)

    def error(self, got: jax.Array, name: str = "logits", first: int = 0) -> float:
        """Of the part of a record's array that begins at the token `first`."""
        want = self.record[name][:, first : first + got.shape[1]]
        return testing.relative_error(got, want)


@functools.cache
def read(folder: pathlib.Path) -> Case:
    model, params = models.load(folder)
    with np.load(folder / "record.npz") as file:
        record = dict(file)

    @functools.partial(jax.jit, static_argnames=("method", "capture_intermediates"))
    def call(params, *given, method="__call__", **keywords):
        with jax.default_matmul_precision("highest"):  # a GPU's own is TF32
            return model.apply({"params": params}, *given, method=method, **keywords)

    tokens = jnp.asarray(record["tokens"], jnp.int32)
    call = functools.partial(call, params)
    return Case(model, call, record, int(record["prompt"]), tokens)


def whole(case: Case) -> dict[str, float]:
    """One call without a state, module by module."""
    logits, captured = case.call(case.tokens, capture_intermediates=is_output)
    seen = captured["intermediates"]
    embedding = case.call(case.tokens, method="_embedded")
    seen["embed"] = {"__call__": (embedding,)}
    found = {}
    for name in case.record:
        if name.startswith("modules/"):
            out = outputs(seen[name.removeprefix("modules/")])
            kept = case.record[name].shape[1]
            found[name] = case.error(out[:, case.prompt - kept : case.prompt], name)
    return found | dict(logits=case.error(logits))


def is_output(module: Any, method: str) -> bool:
    del module
    return method in ("__call__", "add")


def outputs(module: dict) -> jax.Array:
    """What a module gave: an array, a layer's stream, or a norm behind an addition."""
    if "add" in module:
        [(_, out)] = module["add"]
        return out
    [out] = module["__call__"]
    if not isinstance(out, tuple):
        return out
    stream, _ = out
    return stream.x + jnp.sum(stream.parts, axis=0)


def greedy(case: Case) -> tuple[dict[str, float], list[int]]:
    """A prefill of the whole prompt and greedy decoding: errors and tokens."""
    logits, state = case.call(case.tokens[:, : case.prompt], case.new_state())
    found, steps, tokens = dict(prefill=case.error(logits)), [], []
    for _ in range(case.prompt, case.tokens.shape[1]):
        token = jnp.argmax(logits[:, -1:], axis=-1)
        logits, state = case.call(token, state)
        tokens.append(int(token[0, 0]))
        steps.append(logits)
    steps = jnp.concatenate(steps, axis=1)
    return found | dict(decoded=case.error(steps, first=case.prompt)), tokens


def decoded(case: Case) -> dict[str, float]:
    """Token by token from the first."""
    state, found = case.new_state(), []
    for position in range(case.tokens.shape[1]):
        logits, state = case.call(case.tokens[:, position : position + 1], state)
        found.append(logits)
    return dict(logits=case.error(jnp.concatenate(found, axis=1)))


def speculative(case: Case) -> dict[str, float]:
    """The prompt in two padded pieces; then steps of which not every token stands."""
    S, tokens, position = max(ACCEPTED), case.tokens, 0
    state, pieces, steps = case.new_state(S - 1), [], []
    while position < case.prompt:
        counted = min(PIECE, case.prompt - position)
        piece = jnp.zeros((1, PIECE), jnp.int32)
        piece = piece.at[:, :counted].set(tokens[:, position : position + counted])
        logits, state = case.call(piece, state, num_tokens=jnp.array([counted]))
        pieces.append(logits[:, :counted])
        position += counted
    last = 1
    for accepted in itertools.cycle(ACCEPTED):
        if position + S > tokens.shape[1]:
            break
        step = tokens[:, position : position + S]
        wrong = (step + 1) % case.model.config.vocab_size
        step = jnp.where(jnp.arange(S) < accepted, step, wrong)
        logits, state = case.call(step, state, num_accepted=jnp.array([last]))
        steps.append(logits[:, :accepted])
        position, last = position + accepted, accepted
    pieces, steps = (jnp.concatenate(parts, axis=1) for parts in (pieces, steps))
    return dict(pieces=case.error(pieces), steps=case.error(steps, first=case.prompt))


def drafted(case: Case) -> dict[str, float]:
    """Drafts of the multi-token prediction head, without a cache and with one."""
    prompt, draft = case.tokens[:, : case.prompt], functools.partial(_draft, case)
    hidden, _ = case.call(prompt, method="hidden")
    once, first, _ = draft(prompt[:, 1:], hidden[:, :-1])
    _, second, _ = draft(prompt[:, 2:], once[:, :-1])
    kept = case.record["mtp/first"].shape[1]
    found = {"first": case.error(first[:, -kept:], "mtp/first")}
    found["second"] = case.error(second[:, -kept:], "mtp/second")

    drafts = case.record["mtp/drafts"]
    cache = case.model.init_draft_cache(1, case.prompt + drafts.shape[1])
    start = jnp.zeros(1, jnp.int32)
    hidden, logits, cache = draft(prompt[:, 1:], hidden[:, :-1], cache, start=start)
    found["cached"] = case.error(logits[:, -kept:], "mtp/first")
    found["chain 0"] = case.error(logits[:, -1:], "mtp/chain")
    for i in range(drafts.shape[1]):
        start = jnp.array([case.prompt - 1 + i])
        hidden, logits, cache = draft(
            drafts[:, i : i + 1], hidden[:, -1:], cache, start=start
        )
        found[f"chain {i + 1}"] = case.error(logits, "mtp/chain", first=i + 1)
    return found


def _draft(case: Case, *given: Any, **tables: Any) -> tuple[jax.Array, jax.Array, Any]:
    hidden, cache = case.call(*given, method="draft", **tables)
    return hidden, case.call(hidden, method="logits"), cache


RUNS = (whole, decoded, speculative, drafted)


def wrong(errors: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in errors.items() if not x < TOLERANCE}
