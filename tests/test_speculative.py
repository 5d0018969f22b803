"""Drafts and a target of Markov chains: what is emitted is the target's own chain."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from chi_squared import surprise

from gdn_jax.generation import sampling
from gdn_jax.generation.sampling import Keys, position_keys, sample

A, ROWS = 5, 40_000
accept = jax.jit(sampling.accept)


def _chain(seed, A=A, temperature=1.0):
    """[A, A]: the distribution of the token after each; none so rare that three of them
    could not be counted."""
    logits = jnp.clip(jax.random.normal(jax.random.key(seed), (A, A)), -1, 1)
    return sampling.probabilities(
        logits,
        sampling.Options(
            jnp.full(A, temperature), jnp.ones(A), jnp.zeros(A, jnp.int32)
        ),
    )


def _seeds(P, seed=0):
    return jax.random.split(jax.random.key(seed), P)


def _step(keys, last, draft, target, num_drafts, rule):
    """Tokens [P, D + 1] of which num_accepted are emitted, and num_accepted."""
    tokens, q = [last], []
    for i in range(keys.draft.shape[1] - 1):
        q.append(draft[tokens[-1]])
        tokens.append(sample(keys.draft[:, i], q[-1]))
    tokens = jnp.stack(tokens, 1)
    drafts = tokens[:, 1:]
    count, following = rule(
        keys, drafts, jnp.stack(q, 1), target[tokens], num_drafts=num_drafts
    )
    column = jnp.arange(tokens.shape[1])
    emitted = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(column == count[:, None] - 1, following[:, None], emitted), count


def _decode(seeds, draft, target, D, length, num_drafts=None, rule=accept):
    """`length` tokens of each row after token 0, and the first step's num_accepted."""
    limits = jnp.full(seeds.shape, D, jnp.int32) if num_drafts is None else num_drafts
    return _loop(seeds, draft, target, limits, D, length, rule)


@functools.partial(jax.jit, static_argnames=("D", "length", "rule"))
def _loop(seeds, draft, target, num_drafts, D, length, rule):
    P = seeds.shape[0]
    rows, column = jnp.arange(P)[:, None], jnp.arange(D + 1, dtype=jnp.int32)

    def body(step, carry):
        out, end, last, first = carry
        at = end[:, None] + column
        tokens, count = _step(
            position_keys(seeds, at), last, draft, target, num_drafts, rule
        )
        stays = column < count[:, None]
        out = out.at[rows, jnp.where(stays, at, length)].set(tokens, mode="drop")
        last, first = tokens[jnp.arange(P), count - 1], jnp.where(step, first, count)
        return out, end + count, last, first

    zeros = jnp.zeros(P, jnp.int32)
    start = jnp.zeros((P, length), jnp.int32), zeros, zeros, zeros
    out, _, _, first = jax.lax.fori_loop(0, length, body, start)
    return out, first


@functools.partial(jax.jit, static_argnums=2)
def _plain(seeds, target, length):
    def body(last, position):
        keys = position_keys(seeds, jnp.full(seeds.shape, position))
        token = sample(keys.next, target[last])
        return token, token

    zeros = jnp.zeros(seeds.shape, jnp.int32)
    return jax.lax.scan(body, zeros, jnp.arange(length, dtype=jnp.int32))[1].T


def _surprises(tokens, target):
    """Of the first token alone, of the first two and of the first three jointly."""
    target = np.asarray(target, np.float64)
    want = target[0]
    for n in (1, 2, 3):
        counts = np.zeros((A,) * n)
        np.add.at(counts, tuple(np.asarray(tokens[:, :n]).T), 1)
        yield surprise(counts, want)
        want = want[..., None] * target


@pytest.mark.parametrize("D", [1, 2, 3])
def test_what_is_emitted_is_distributed_as_plain_sampling(D):
    draft, target = _chain(1), _chain(2)
    tokens, _ = _decode(_seeds(ROWS), draft, target, D, 3)
    assert max(_surprises(tokens, target)) < 1


def test_plain_sampling_is_distributed_so():
    target = _chain(2)
    assert max(_surprises(_plain(_seeds(ROWS), target, 3), target)) < 1


def _by_p_alone(keys, x, q, p, **keywords):
    return accept(keys, x, jnp.ones_like(q), p, **keywords)


def _every_draft(keys, x, q, p, **keywords):
    return accept(keys, x, jnp.zeros_like(q), p, **keywords)


def _next_of_p(keys, x, q, p, **keywords):
    count, _ = accept(keys, x, q, p, **keywords)
    rows = jnp.arange(x.shape[0])
    return count, sample(keys.next[rows, count - 1], p[rows, count - 1])


def _one_key_for_all(keys, *args, **keywords):
    return accept(Keys(keys.draft, keys.draft, keys.draft), *args, **keywords)


@pytest.mark.parametrize(
    "wrong", [_by_p_alone, _every_draft, _next_of_p, _one_key_for_all]
)
def test_a_wrong_rule_would_be_seen(wrong):
    draft, target = _chain(1), _chain(2)
    tokens, _ = _decode(_seeds(ROWS), draft, target, 1, 3, rule=wrong)
    assert min(_surprises(tokens, target)) > 4


def test_drafts_stand_as_often_as_they_can():
    """Each with probability sum(min(p, q)), where every position is like the others."""
    q, p = (jnp.broadcast_to(_chain(seed)[0], (A, A)) for seed in (1, 2))
    _, count = _decode(_seeds(ROWS), q, p, 3, 3)
    stands = float(jnp.minimum(p[0], q[0]).sum())
    want = [stands**n * (1 - stands) for n in range(3)] + [stands**3]
    assert surprise(np.bincount(count - 1, minlength=4), want) < 1


@pytest.mark.parametrize("draft", ["greedy", "sampled", "same"])
def test_greedy_is_exact(draft):
    A, length, D = 50, 12, 3
    target = _chain(3, A, 0.0)
    draft = dict(greedy=_chain(4, A, 0.0), sampled=_chain(5, A), same=target)[draft]
    draft = 0.3 * target + 0.7 * draft if draft is not target else draft
    seeds = _seeds(64)
    tokens, count = _decode(seeds, draft, target, D, length)
    np.testing.assert_array_equal(tokens, _plain(seeds, target, length))
    want = []
    for _ in range(length):
        want.append(int(target[want[-1] if want else 0].argmax()))
    assert (tokens == jnp.array(want)).all()
    if draft is target:
        assert (count == D + 1).all()


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_greedy_without_distributions_is_the_same(q):
    """Whatever the drafts' probabilities; ties and drafts of all lengths included."""
    P, D = 64, 3
    logits = jax.random.randint(jax.random.key(1), (P, D + 1, A), 0, 3).astype(float)
    options = sampling.Options(jnp.zeros(P), jnp.ones(P), jnp.zeros(P, jnp.int32))
    p = sampling.probabilities(logits, options)
    best = sampling.most_likely(logits)
    np.testing.assert_array_equal(best, jnp.argmax(p, axis=-1))
    wrong = jax.random.bernoulli(jax.random.key(2), 0.3, (P, D))
    drafts = jnp.where(wrong, (best[:, :D] + 1) % A, best[:, :D]).astype(jnp.int32)
    keys = position_keys(
        _seeds(P), jnp.tile(jnp.arange(D + 1, dtype=jnp.int32), (P, 1))
    )
    want = accept(keys, drafts, jnp.full((P, D, A), q), p)
    got = sampling.accept_most_likely(drafts, logits)
    for each, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(each, wanted)
    assert len(set(np.asarray(got[0]).tolist())) == D + 1


def test_each_row_has_its_own_number_of_drafts():
    draft, target, D = _chain(1), _chain(2), 3
    limits = jnp.arange(ROWS, dtype=jnp.int32) % (D + 1)
    tokens, count = _decode(_seeds(ROWS), draft, target, D, 3, limits)
    assert max(_surprises(tokens, target)) < 1
    for limit in range(D + 1):
        assert count[limit :: D + 1].max() == limit + 1
    plain = _plain(_seeds(ROWS), target, 3)
    np.testing.assert_array_equal(tokens[:: D + 1], plain[:: D + 1])
    assert (tokens != plain).any()


def test_a_row_decodes_the_same_in_any_batch():
    draft, target, D = _chain(1), _chain(2), 2
    limits = jnp.array([0, 2, 1, 2, 2, 1], jnp.int32)
    whole, _ = _decode(_seeds(6), draft, target, D, 9, limits)
    for rows in ([4, 4, 4, 4, 4, 4], [5, 1, 0, 3, 1, 2]):
        at = jnp.array(rows)
        tokens, _ = _decode(_seeds(6)[at], draft, target, D, 9, limits[at])
        np.testing.assert_array_equal(tokens, whole[at])


def _call(P=64, D=3, A=6, seed=0):
    rng = np.random.default_rng(seed)
    q, p = rng.dirichlet(np.ones(A), (P, D)), rng.dirichlet(np.ones(A), (P, D + 1))
    positions = np.broadcast_to(np.arange(D + 1, dtype=np.int32), (P, D + 1))
    return dict(
        keys=jax.jit(position_keys)(_seeds(P, seed), jnp.asarray(positions)),
        draft_tokens=jnp.asarray(rng.integers(0, A, (P, D)), jnp.int32),
        draft_probabilities=jnp.asarray(q, jnp.float32),
        target_probabilities=jnp.asarray(p, jnp.float32),
    )


def _equal(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype == jnp.int32
        np.testing.assert_array_equal(x, y)


def test_what_is_past_the_drafts_reaches_nothing():
    call = _call()
    limits = jnp.arange(64, dtype=jnp.int32) % 4
    past = jnp.arange(3) >= limits[:, None]
    far = jnp.arange(4)[:, None] > limits[:, None, None]
    poisoned = call | dict(
        draft_tokens=jnp.where(past, -1, call["draft_tokens"]),
        draft_probabilities=jnp.where(
            past[..., None], jnp.nan, call["draft_probabilities"]
        ),
        target_probabilities=jnp.where(far, jnp.nan, call["target_probabilities"]),
    )
    want = accept(**call, num_drafts=limits)
    assert len(np.unique(want[0])) == 4
    _equal(accept(**poisoned, num_drafts=limits), want)


def test_limits_outside_are_the_nearest_inside():
    call, limits = _call(), jnp.arange(64, dtype=jnp.int32) % 9 - 3
    want = accept(**call, num_drafts=jnp.clip(limits, 0, 3))
    _equal(accept(**call, num_drafts=limits), want)


def test_without_drafts_it_is_plain_sampling():
    call = _call(D=0)
    p, key = call["target_probabilities"], call["keys"].next
    _equal(accept(**call), (jnp.ones(64, jnp.int32), sample(key[:, 0], p[:, 0])))


def test_a_draft_of_no_probability_falls_and_never_comes_back():
    call = _call(P=512, D=1)
    x, p = call["draft_tokens"], call["target_probabilities"]
    impossible = jnp.arange(6) == x[..., None]
    call |= dict(target_probabilities=jnp.where(impossible, 0, p))
    count, token = accept(**call)
    assert (count == 1).all() and (token != x[:, 0]).all()


def test_no_residual_is_drawn_from_p():
    """p and q alike but for weights that add up differently: p <= q everywhere."""
    call = _call(P=2048, D=1)
    p = call["target_probabilities"].at[:, 0].set(jnp.array([0.1, 0, 0.2, 0.3, 0, 0.4]))
    call |= dict(target_probabilities=p, draft_probabilities=2 * p[:, :1])
    call |= dict(draft_tokens=jnp.full((2048, 1), 5, jnp.int32))
    count, token = accept(**call)
    fallen = token[count == 1]
    assert surprise(np.bincount(fallen, minlength=6), p[0, 0]) < 1


def test_jit_vmap_and_64_bits_change_nothing():
    calls = [_call(seed=seed) for seed in range(3)]
    want = [accept(**call) for call in calls]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *calls)
    together = jax.jit(jax.vmap(lambda call: accept(**call)))
    _equal(together(stacked), jax.tree.map(lambda *x: jnp.stack(x), *want))
    with jax.enable_x64(True):
        _equal(accept(**calls[0]), want[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(draft_tokens=jnp.zeros(64, jnp.int32)), r"draft_tokens must be \[P, D\]"),
        (dict(draft_tokens=jnp.zeros((64, 3))), "draft_tokens must be int32"),
        (
            dict(draft_probabilities=jnp.zeros((64, 4, 6))),
            r"draft_probabilities must be \[P, D, A\] = \(64, 3, A\)",
        ),
        (
            dict(target_probabilities=jnp.zeros((64, 3, 6))),
            r"target_probabilities must be \[P, D \+ 1, A\] = \(64, 4, 6\)",
        ),
        (dict(keys=_call(D=2)["keys"]), r"keys.accept must be \[P, D \+ 1\]"),
        (dict(keys=Keys(1, 2, 3)), "keys.draft must be typed keys; got int"),
        (dict(num_drafts=jnp.zeros(63, jnp.int32)), r"num_drafts must be \[P\] = "),
        (dict(num_drafts=jnp.zeros(64)), "num_drafts must be int32"),
    ],
)
def test_a_wrong_call_is_told(change, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=text):
        accept(**_call() | change)
