"""The layer: what one call serves equals what plain calls give."""

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from layers import agree, apply, tokens

from gdn_jax import testing

RULES = ("fused", "chunk")
# To the rule's path layouts are the same; per-K decays are not.
MODELS_AND_RULES = pytest.mark.parametrize(
    ("model", "rule"),
    [
        *((model, "fused") for model in layers.MODELS),
        ("Qwen3.5", "chunk"),
        ("Kimi-Linear", "chunk"),
    ],
)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):  # a GPU's own is TF32
        yield


@MODELS_AND_RULES
def test_prefill_then_decoding_equals_one_prefill(model, rule):
    _prefill_and_decode(model, rule, None)


@pytest.mark.parametrize("rule", RULES)
def test_every_implementation_does_so(rule, path):
    _prefill_and_decode("Qwen3.5", rule, path)


def _prefill_and_decode(model, rule, path):
    layer, params = layers.make(model)
    x = tokens(2, 21)
    want, want_state = apply(layer, params, x, path=rule, implementation=path)

    y, state = apply(layer, params, x[:, :18], path=rule, implementation=path)
    parts = [y]
    for t in range(18, 21):
        y, state = apply(layer, params, x[:, t : t + 1], state, implementation=path)
        parts.append(y)
    assert agree(jnp.concatenate(parts, axis=1), want, rule)
    for got, wanted in zip(
        layers.recurrent_and_history(layer, state),
        layers.recurrent_and_history(layer, want_state),
        strict=True,
    ):
        assert agree(got, wanted, rule)


@pytest.mark.parametrize("rule", RULES)
def test_no_state_is_a_state_of_zeros(rule):
    layer, params = layers.make()
    x = tokens(2, 5)
    y, _ = apply(layer, params, x, path=rule)
    want, _ = apply(layer, params, x, layer.init_state(2), path=rule)
    assert np.array_equal(y, want)


@pytest.mark.parametrize("rule", RULES)
def test_packed_rows_equal_dense_ones(rule):
    layer, params = layers.make()
    x = tokens(3, 7)
    want, want_state = apply(layer, params, x, path=rule)
    cu_seqlens = jnp.arange(4, dtype=jnp.int32) * 7
    y, state = apply(layer, params, x.reshape(21, -1), cu_seqlens=cu_seqlens, path=rule)
    assert agree(y.reshape(x.shape), want, rule)
    assert agree(state.recurrent, want_state.recurrent, rule)


@pytest.mark.parametrize("T", [1, 20], ids=["fused", "in chunks"])
@pytest.mark.parametrize("decode", [None, "replay"])
def test_a_state_read_past_the_end_of_float16_is_normalised(decode, T):
    """65504 is the end; the norm behind brings any number near 1."""
    layer, params = layers.make(dtype=jnp.float16)
    exact, _ = layers.make()
    state, exact_state = (each.init_state(2, decode=decode) for each in (layer, exact))
    grown = 1e7 * jax.random.normal(jax.random.key(0), (2, 4, 6, 8))

    def grow(state):
        recurrent = grown
        if decode is not None:
            recurrent = state.recurrent._replace(checkpoint=grown)
        return state._replace(recurrent=recurrent)

    x = tokens(2, T).astype(jnp.float16)
    y, _ = apply(layer, params, x, grow(state))
    want, _ = apply(exact, params, x.astype(jnp.float32), grow(exact_state))
    assert y.dtype == jnp.float16
    assert testing.relative_error(y, want) < 0.01  # of all that float16 rounds


def test_packed_decoding_equals_dense():
    layer, params = layers.make()
    _, state = apply(layer, params, tokens(3, 5), path="fused")
    x = tokens(3, 1, seed=2)
    want, _ = apply(layer, params, x, state)
    y, _ = apply(layer, params, x[:, 0], state)
    assert agree(y, want[:, 0])


@MODELS_AND_RULES
def test_a_mixed_batch_equals_its_rows_alone(model, rule):
    """One row decodes, one begins in a recycled slot, one is empty, one goes on with
    its prompt, one begins with a single token; then padding."""
    layer, params = layers.make(model)
    _, begun = apply(layer, params, tokens(2, 5), path="fused")
    slots, fresh = jnp.array([6, 0, 3, 4, 1], jnp.int32), jnp.array([0, 1, 3, 5, 2, 7])
    pool = jax.tree.map(
        lambda empty, rows: empty.at[jnp.array([6, 4])].set(rows),
        layer.init_state(8),
        begun,
    )
    pool = layers.poisoned(pool, fresh)
    lengths = [1, 8, 0, 8, 1]
    ends = np.cumsum([0, *lengths])
    x = jnp.concatenate([tokens(18, seed=3), jnp.full((2, layers.D), jnp.nan)])

    y, state = apply(
        layer,
        params,
        x,
        pool,
        slots=slots,
        cu_seqlens=jnp.asarray(ends, jnp.int32),
        has_state=jnp.array([True, False, False, True, False]),
        path=rule,
    )
    wants, want_states = [], []
    for n, row in ((0, 0), (1, None), (3, 1), (4, None)):
        alone = None
        if row is not None:
            alone = jax.tree.map(lambda s, row=row: s[row : row + 1], begun)
        part = x[None, ends[n] : ends[n + 1]]
        want, want_state = apply(layer, params, part, alone, path="fused")
        wants.append(want[0])
        want_states.append(layers.recurrent_and_history(layer, want_state))
    assert agree(y[:18], jnp.concatenate(wants), rule)
    got = layers.recurrent_and_history(layer, state, slots[jnp.array([0, 1, 3, 4])])
    for part, rows in zip(got, zip(*want_states, strict=True), strict=True):
        assert agree(part, jnp.concatenate(rows), rule)
    assert not np.asarray(y[18:]).any()
    untouched = np.array([2, 3, 5, 7])
    assert np.isnan(np.asarray(state.recurrent)[untouched]).all()


@pytest.mark.parametrize("model", layers.MODELS)
def test_verification_equals_plain_decoding(model):
    _verify(model, "ragged", apart=False)


@pytest.mark.parametrize("apart", [False, True], ids=["one table", "conv_slots"])
@pytest.mark.parametrize("drafts", ["dense", "packed", "ragged"])
def test_drafts_come_in_any_form(drafts, apart):
    _verify("Qwen3.5", drafts, apart)


def _verify(model, drafts, apart):
    """Row n accepts n + 1 tokens of the first step."""
    layer, params = layers.make(model)
    N = S = 4
    keywords = {}
    prompt, first, second = tokens(N, 5), tokens(N, S, seed=2), tokens(N, S, seed=3)
    table = jnp.asarray(np.random.default_rng(0).permutation(20)[:16].reshape(N, S))
    pool = layer.init_state(20, columns=S, num_conv_slots=N if apart else None)
    if apart:
        keywords["conv_slots"] = jnp.array([2, 0, 3, 1])
    accepted = jnp.arange(1, N + 1)
    lengths = [4, 1, 3, 2] if drafts == "ragged" else [S] * N

    _, pool = apply(
        layer, params, prompt, pool, slots=table[:, 0], path="fused", **keywords
    )
    ones = jnp.ones(N, jnp.int32)
    _, pool = apply(
        layer, params, first, pool, slots=table, num_accepted=ones, **keywords
    )
    if drafts == "dense":
        x, where = second, {}
    else:
        x = jnp.concatenate([second[n, :length] for n, length in enumerate(lengths)])
        where = dict(cu_seqlens=jnp.asarray(np.cumsum([0, *lengths]), jnp.int32))
    y, pool = apply(
        layer, params, x, pool, slots=table, num_accepted=accepted, **where, **keywords
    )
    y = y.reshape(-1, layers.D)
    plain = jnp.zeros((N, 5 + 2 * S, layers.D))
    for n, length in enumerate(lengths):
        row = jnp.concatenate([prompt[n], first[n, : n + 1], second[n, :length]])
        plain = plain.at[n, : len(row)].set(row)
    want, _ = apply(layer, params, plain, path="fused")
    for n, length in enumerate(lengths):
        part = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        begin = 5 + n + 1
        assert agree(y[part], want[n, begin : begin + length])


def test_a_plain_step_goes_on_behind_a_verified_one():
    """After verification a row's rest may come as another step with its count."""
    layer, params = layers.make()
    prompt, drafted, last = tokens(1, 5), tokens(1, 3, seed=2), tokens(1, 1, seed=3)
    table = jnp.array([[1, 3, 0]])
    _, pool = apply(layer, params, prompt, layer.init_state(4, columns=3),
                    slots=table[:, 0], path="fused")  # fmt: skip
    for x, accepted in ((drafted, 1), (last, 2)):
        y, pool = apply(
            layer, params, x, pool, slots=table, num_accepted=jnp.array([accepted])
        )
    plain = jnp.concatenate([prompt, drafted[:, :2], last], axis=1)
    want, _ = apply(layer, params, plain, path="fused")
    assert agree(y, want[:, -1:])
