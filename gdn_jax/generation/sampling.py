"""From logits to tokens: each row a request with options and keys of its own.

All of it is functions of arrays, for use inside a jitted decoding loop.

P   rows (requests) of a batch        A   tokens of the vocabulary
T   tokens of one row                 D   drafts of a speculative step
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int32, Key

from gdn_jax.generation.border import kept_from
from gdn_jax.generation.keys import Keys as Keys
from gdn_jax.generation.keys import check_keys, uniform
from gdn_jax.generation.keys import position_keys as position_keys
from gdn_jax.ops import checks


class Options(NamedTuple):
    """How each row's next token is chosen.

    temperature: of the softmax, finite; 0 takes the most likely token.
    top_p: in (0, 1]; 1 is off.
    top_k: 0 is off, and so is anything above A.
    """

    temperature: Float32[Array, " P"]
    top_p: Float32[Array, " P"]
    top_k: Int32[Array, " P"]


def probabilities(
    logits: Float[Array, "P *T A"], options: Options
) -> Float32[Array, "P *T A"]:
    """The distribution that a row's options make of its logits.

        w = exp((logits - max) / temperature), 0 outside the top_k and then the top_p
        probability = w / sum(w)

    top_k keeps the k largest logits. top_p then keeps the fewest of the most likely
    tokens whose share of what top_k kept reaches top_p: at least the most likely one.
    A tie at either border is kept whole. Temperature 0 is one-hot at the largest logit,
    the lowest token of a tie, whatever the other options.

    Neither sorts. A border is a float32 whose bits are found one by one, each from a
    pass over the logits, and no pass is made where no row of the batch needs it. The
    sums are float32: a border may be off by a token where sums differ from top_p by
    their own rounding.

    Args:
      logits: [P, ..., A]. A logit of -inf has probability 0.
      options: of each row.

    Returns:
      [P, ..., A] float32. NaN throughout where a token's logits have NaN or +inf or are
      all -inf; no other token's.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
    """
    logits = checks.floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        remedy = "Rows first, the vocabulary last."
        checks.fail("logits", logits.shape, "[P, ..., A] with A >= 1", remedy)
    options = _options(options, logits.shape[0])
    rows = (-1, *[1] * (logits.ndim - 1))
    temperature, top_p, top_k = (x.reshape(rows) for x in options)
    samples = temperature > 0

    x = logits.astype(jnp.float32)
    top = jnp.max(x, axis=-1, keepdims=True)
    w = jnp.exp((x - top) / jnp.where(samples, temperature, 1))
    border = kept_from(x, w, top, jnp.where(samples, top_p, 1), samples * top_k)
    w = jnp.where(x >= border, w, 0)
    sampled = w / jnp.sum(w, axis=-1, keepdims=True)

    best = lax.argmax(x, x.ndim - 1, jnp.int32)
    one_hot = jax.nn.one_hot(best, x.shape[-1], dtype=jnp.float32)
    greedy = jnp.where(jnp.isfinite(top), one_hot, jnp.nan)
    return jnp.where(samples, sampled, greedy)


def sample(
    keys: Key[Array, "P ..."], probabilities: Float[Array, "P *T A"]
) -> Int32[Array, "P ..."]:
    """A token of each distribution, drawn with its own key.

    The inverse of the cumulative distribution, in two draws: a block of about sqrt(A)
    tokens, then a token in it. A float32 uniform has steps of 2^-23, which among A
    tokens at once are not small, and one uniform for each token would cost more than
    all the rest.

    Args:
      keys: [P, ...], see `position_keys`.
      probabilities: [P, ..., A], or weights of any sum > 0.

    Returns:
      Tokens, int32. One of probability 0 is never drawn, one of all the probability
      always. Without any probability, or with NaN, the token means nothing; it is in
      [0, A).

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
    """
    keys, p = check_keys("keys", keys), checks.floating("probabilities", probabilities)
    if p.shape[:-1] != keys.shape or p.shape[-1:] in ((), (0,)):
        got, wanted = p.shape, f"[P, ..., A] with keys' {keys.shape} and A >= 1"
        checks.fail("probabilities", got, wanted, "One key a distribution.")
    A = p.shape[-1]
    width = math.isqrt(A - 1) + 1
    count = -(-A // width)
    unpadded = [(0, 0)] * keys.ndim
    blocks = jnp.pad(p.astype(jnp.float32), [*unpadded, (0, count * width - A)])
    blocks = blocks.reshape(*keys.shape, count, width)

    draws = uniform(keys, 2)
    block = _inverse(draws[..., 0], jnp.sum(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
    token = _inverse(draws[..., 1], jnp.squeeze(inside, -2))
    return jnp.minimum(block * width + token, A - 1)


def _inverse(chance: Array, weights: Array) -> Array:
    """The first index at which the running sum exceeds chance [0, 1) times the sum.

    Parallel running sums are not exactly monotone: only indices of some weight count.
    """
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    exceeds = running > chance[..., None] * jnp.max(running, axis=-1, keepdims=True)
    return lax.argmax(exceeds, weights.ndim - 1, jnp.int32)


def accept(
    keys: Keys,
    draft_tokens: Int32[Array, "P D"],
    draft_probabilities: Float[Array, "P D A"],
    target_probabilities: Float[Array, "P D_plus_1 A"],
    *,
    num_drafts: Int32[Array, " P"] | None = None,
) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """Which drafts stand and the token after them, distributed as if drawn from p.

    With x drafts, q what they were drawn from and p the target's distributions:

        draft i stands, if those before it do, with probability min(1, p_i(x) / q_i(x))
        where one falls, next ~ max(p_i - q_i, 0), normalised
        where all stand, next ~ p_D

    One-hot p gives the tokens of greedy decoding, exactly, whatever q. A draft with
    p_i(x) = 0 falls. Where rounding leaves nothing of p_i - q_i, next ~ p_i.

    Source: Leviathan, Kalman, Matias (arXiv:2211.17192), algorithm 1; Chen et al.
    (arXiv:2302.01318), algorithm 2.

    Args:
      keys: [P, D + 1], `position_keys` of the drafts' positions and of the one after.
        Draft i is to be drawn with `keys.draft[:, i]`.
      draft_tokens: int32.
      draft_probabilities, target_probabilities: q and p, as `probabilities` makes them.
      num_drafts: how many drafts a row has, 0..D; None: D. Those past it fall, whatever
        they hold, and next ~ p at the first of them: without drafts as plain sampling
        does, with the same key.

    Returns:
      num_accepted: [P] int32 in 1..D + 1, the token that entered the step and the
        drafts that stand, as `gdn_jax.fused_update` takes it.
      next_token: [P] int32.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
    """
    x = checks.integers("draft_tokens", draft_tokens)
    q, p = (
        checks.floating(name, probabilities).astype(jnp.float32)
        for name, probabilities in dict(
            draft_probabilities=draft_probabilities,
            target_probabilities=target_probabilities,
        ).items()
    )
    keys = Keys(*map(check_keys, ("keys.draft", "keys.accept", "keys.next"), keys))
    num_drafts = _check_drafts(keys, x, q, p, num_drafts)
    P, D = x.shape

    def of_draft(probabilities: Array) -> Array:
        return jnp.take_along_axis(probabilities, x[..., None], axis=-1)[..., 0]

    # p > q u and not p / q > u: nothing divides by zero, and p = 0 always falls
    chance = uniform(keys.accept[:, :D], 1)[..., 0]
    stands = of_draft(p[:, :D]) > of_draft(q) * chance
    stands &= (x >= 0) & (x < p.shape[-1])
    stands &= jnp.arange(D, dtype=jnp.int32) < num_drafts[:, None]
    falls = jnp.pad(~stands, ((0, 0), (0, 1)), constant_values=True)
    first = lax.argmax(falls, 1, jnp.int32)

    rows = jnp.arange(P, dtype=jnp.int32)
    p_first = p[rows, first]
    q_first = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))[rows, first]
    drafted = (first < num_drafts)[:, None]
    residual = jnp.maximum(p_first - jnp.where(drafted, q_first, 0), 0)
    some = jnp.sum(residual, axis=-1, keepdims=True) > 0
    token = sample(keys.next[rows, first], jnp.where(some, residual, p_first))
    return first + 1, token


def most_likely(logits: Float[Array, "*T A"]) -> Int32[Array, "*T"]:
    """What `sample` draws at temperature 0, in one pass: the lowest token of a tie."""
    x = checks.floating("logits", logits).astype(jnp.float32)
    return lax.argmax(x, x.ndim - 1, jnp.int32)


def accept_most_likely(
    draft_tokens: Int32[Array, "P D"], logits: Float[Array, "P D_plus_1 A"]
) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """`accept` where every row's temperature is 0: drafts stand while each is the most
    likely token, and the most likely one follows."""
    best = most_likely(logits)
    falls = jnp.pad(
        draft_tokens != best[:, :-1], ((0, 0), (0, 1)), constant_values=True
    )
    first = lax.argmax(falls, 1, jnp.int32)
    return first + 1, jnp.take_along_axis(best, first[:, None], axis=1)[:, 0]


def log_probability(
    logits: Float[Array, "*T A"], tokens: Int32[Array, "*T"]
) -> Float32[Array, "*T"]:
    """log softmax(logits) at the tokens: the model's own, before any option.

    Args:
      logits: [..., A], -inf allowed.
      tokens: [...] int32 in [0, A).

    Returns:
      [...] float32.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
    """
    x = checks.floating("logits", logits).astype(jnp.float32)
    tokens = checks.integers("tokens", tokens)
    if x.ndim == 0 or x.shape[:-1] != tokens.shape:
        wanted = f"logits' leading axes {x.shape[:-1]}"
        checks.fail("tokens", tokens.shape, wanted, "One token a distribution.")
    at_tokens = jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
    return at_tokens - jax.nn.logsumexp(x, axis=-1)


def _options(options: Options, P: int) -> Options:
    temperature, top_p, top_k = options
    options = Options(
        checks.floating("temperature", temperature).astype(jnp.float32),
        checks.floating("top_p", top_p).astype(jnp.float32),
        checks.integers("top_k", top_k),
    )
    for name, x in options._asdict().items():
        if x.shape != (P,):
            checks.fail(name, x.shape, f"[P] = ({P},)", "One entry a row of logits.")
    return options


def _check_drafts(
    keys: Keys, x: Array, q: Array, p: Array, num_drafts: Array | None
) -> Array:
    if x.ndim != 2:
        checks.fail("draft_tokens", x.shape, "[P, D]", "One row a request.")
    P, D = x.shape
    if q.ndim != 3 or q.shape[:2] != (P, D):
        wanted = f"[P, D, A] = ({P}, {D}, A)"
        checks.fail("draft_probabilities", q.shape, wanted, "See draft_tokens.")
    whole = (P, D + 1, q.shape[2])
    if p.shape != whole:
        remedy = "The target goes one further than the drafts."
        checks.fail("target_probabilities", p.shape, f"[P, D + 1, A] = {whole}", remedy)
    for name in ("accept", "next"):
        shape = getattr(keys, name).shape
        if shape != whole[:2]:
            remedy = "Pass position_keys of D + 1 positions a row."
            checks.fail(f"keys.{name}", shape, f"[P, D + 1] = {whole[:2]}", remedy)
    if num_drafts is None:
        return jnp.full(P, D, jnp.int32)
    num_drafts = checks.integers("num_drafts", num_drafts)
    if num_drafts.shape != (P,):
        checks.fail("num_drafts", num_drafts.shape, f"[P] = ({P},)", "One a row.")
    return num_drafts
