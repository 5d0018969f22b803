"""The causal convolution: every implementation against float64, and against itself."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gdn_jax
from gdn_jax import ConvState, testing


def _call(args, kwargs, name):
    arrays = {k: v for k, v in kwargs.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in kwargs.items() if k not in arrays}

    @functools.partial(jax.jit, donate_argnums=0)
    def convolve(state, x, weight, arrays):
        return gdn_jax.causal_conv1d(
            state, x, weight, **arrays, **static, implementation=name
        )

    state = jax.tree.map(jnp.array, args[0])
    return convolve(state, *args[1:], arrays)


@pytest.mark.parametrize("case", testing.CONV_CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case, path):
    args, kwargs = testing.make_conv(case)
    want, histories = testing.conv_oracle(case, args, kwargs)
    state, y = _call(args, kwargs, path)
    assert y.shape == args[1].shape
    bar = testing.TOLERANCE["out", case.dtype]
    assert testing.relative_error(y.reshape(want.shape), want) < bar
    assert not np.asarray(y).reshape(want.shape)[want == 0].any()
    for slot, counts in histories.items():
        for i, history in enumerate(counts):
            accepted = jnp.full(state.start.shape, i + 1)
            given = accepted if case.speculative else None
            got = state.to_dense(case.width, given)[slot]
            assert np.array_equal(np.asarray(got, np.float64), history)
    others = [p for p in range(len(state.start)) if p not in histories]
    for got, old in zip(state, args[0], strict=True):  # not a bit of other slots
        same = np.asarray(got)[others].view(np.uint8), old[others].view(np.uint8)
        assert np.array_equal(*same)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_prefill_and_steps_equal_one_call(path, columns):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 11, 5)).astype(np.float32)
    weight = random.standard_normal((5, 4)).astype(np.float32)
    state = ConvState.zeros(2, 5, 4, jnp.float32, columns=columns)
    call = functools.partial(gdn_jax.causal_conv1d, implementation=path)
    _, want = call(state, x, weight)
    parts = []
    for begin, end in [(0, 6), (6, 7), (7, 9), (9, 10), (10, 11)]:
        state, y = call(state, x[:, begin:end], weight)
        parts.append(y)
    assert testing.relative_error(np.concatenate(parts, axis=1), want) < 1e-6


def test_inputs_are_stored_in_the_states_dtype(path):
    """What comes after them reads them so; a call's own tokens meet as they are."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, 4, 5)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((5, 4)), jnp.float32)
    call = functools.partial(gdn_jax.causal_conv1d, implementation=path)
    state, y = call(ConvState.zeros(1, 5, 4, jnp.bfloat16), x[:, :3], weight)
    stored = x[:, :3].astype(jnp.bfloat16)
    assert np.array_equal(state.to_dense(4), stored.swapaxes(1, 2))
    whole = ConvState.zeros(1, 5, 4, jnp.float32)
    _, want = call(whole, x[:, :3], weight)
    assert y.dtype == x.dtype and testing.relative_error(y, want) < 1e-6
    rounded, _ = call(whole, stored.astype(jnp.float32), weight)
    (_, got), (_, want) = (call(each, x[:, 3:], weight) for each in (state, rounded))
    assert testing.relative_error(got, want) < 1e-6


def test_verify_with_any_count_equals_plain_steps(path):
    """Drafts beyond the accepted ones are lies, and leave no trace."""
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 5)).astype(np.float32)
    weight = random.standard_normal((5, 4)).astype(np.float32)
    call = functools.partial(gdn_jax.causal_conv1d, implementation=path)
    _, want = call(ConvState.zeros(1, 5, 4, jnp.float32), x[None], weight)
    state = ConvState.zeros(1, 5, 4, jnp.float32, columns=4)
    state, _ = call(state, x[None, :3], weight)  # prefill
    at, accepted = 3, 1
    for stand in (1, 4, 2, 2):
        drafts = random.standard_normal((1, 4, 5)).astype(np.float32)
        drafts[0, :stand] = x[at : at + stand]
        counts = jnp.array([accepted], jnp.int32)
        state, y = call(state, drafts, weight, num_accepted=counts)
        assert testing.relative_error(y[0, :stand], want[0, at : at + stand]) < 1e-6
        at, accepted = at + stand, stand


def test_y_in_parts_is_y_taken_apart(path):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 7, 5)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((5, 4)), jnp.float32)
    state = ConvState.zeros(2, 5, 4, jnp.float32)
    call = functools.partial(gdn_jax.causal_conv1d, state, implementation=path)

    def whole(x, weight):
        return call(x, weight)[1]

    def joined(x, weight):
        parts = call(x, weight, split=(2, 1, 2))[1]
        assert [part.shape for part in parts] == [(2, 7, 2), (2, 7, 1), (2, 7, 2)]
        return jnp.concatenate(parts, axis=-1)

    (want, of_whole), (got, of_joined) = (
        jax.jit(lambda x, weight, f=f: jax.vjp(f, x, weight))(x, weight)
        for f in (whole, joined)
    )
    assert np.array_equal(got, want)
    cotangent = jnp.cos(want)
    for a, b in zip(of_joined(cotangent), of_whole(cotangent), strict=True):
        assert testing.relative_error(a, b) < 1e-6


def test_gradients_equal_finite_differences_and_nulls_have_none(path):
    case = testing.ConvCase(
        "packed", (3, 0, 5, 2), tokens="packed", null_rows=(3,), padding=2
    )
    (state, x, weight), kwargs = testing.make_conv(case)
    alive = np.isfinite(x)
    static = {"activation": kwargs.pop("activation")}

    def loss(buffer, x, weight):
        new, y = gdn_jax.causal_conv1d(
            ConvState(buffer, state.start),
            x,
            weight,
            **kwargs,
            **static,
            implementation=path,
        )
        kept = jnp.nan_to_num(new.to_dense(case.width))
        return jnp.sum(jnp.sin(y)) + jnp.sum(kept**2)

    given = (state.buffer, x, weight)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)
    assert not gradients[1][~alive].any()
    random, total, change = np.random.default_rng(1), 0.0, []
    for value, gradient in zip(given, gradients, strict=True):
        direction = random.standard_normal(value.shape).astype(np.float32)
        direction = np.where(np.isfinite(value), direction, 0)
        change.append(direction)
        total += float(np.sum(np.nan_to_num(gradient) * direction))
    step = 1e-2
    up, down = (
        loss(*(v + s * step * d for v, d in zip(given, change, strict=True)))
        for s in (1, -1)
    )
    assert abs((up - down) / (2 * step) - total) < 2e-3 * max(1, abs(total))


def test_from_dense_is_the_inverse_of_to_dense():
    history = jnp.arange(24.0).reshape(2, 4, 3)
    assert jnp.array_equal(
        ConvState.from_dense(history, columns=3).to_dense(4), history
    )


GOOD = dict(
    state=ConvState.zeros(3, 5, 4, jnp.float32),
    x=jnp.zeros((3, 2, 5)),
    weight=jnp.zeros((5, 4)),
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(x=jnp.zeros(5)), r"x must be \[N, T, C\] .*; got \(5,\)"),
        (dict(weight=jnp.zeros((4, 5))), r"weight must be \[C, W\] .*; got \(4, 5\)"),
        (dict(bias=jnp.zeros(4)), r"bias must be \[C\] = \(5,\); got \(4,\)"),
        (
            dict(state=ConvState.zeros(3, 5, 3, jnp.float32)),
            r"state.buffer must be \[P, C, W - 1 \+ S\] .*; got \(3, 5, 3\)",
        ),
        (dict(activation="relu"), "activation must be 'silu' or None; got 'relu'"),
        (dict(slots=jnp.zeros((3, 2), jnp.int32)), r"slots must be \[N\] = \(3,\)"),
        (dict(slots=np.zeros(3)), "slots must be int32; got float64"),
        (dict(x=jnp.zeros((2, 2, 5))), "state must be one slot per row .*; got 3"),
        (
            dict(num_accepted=jnp.ones(3, jnp.int32)),
            "state.buffer must be .* S >= T .*; got room for 1 tokens",
        ),
        (
            dict(cu_seqlens=jnp.zeros(4, jnp.int32)),
            "cu_seqlens must be given with packed tokens",
        ),
        (dict(split=(2, 4)), "split must be positive sizes whose sum is C = 5; got"),
        (dict(split=(6, -1)), "split must be positive sizes whose sum is C = 5; got"),
        (dict(implementation="cuda"), "implementation must be None or one of"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    with pytest.raises(ValueError, match=text):
        gdn_jax.causal_conv1d(**GOOD | change)


def test_a_state_of_another_type_is_told():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="ConvState"):
        gdn_jax.causal_conv1d(**GOOD | dict(state=(1, 2)))


def test_an_empty_call_returns_what_it_got(path):
    state = ConvState.zeros(3, 5, 4, jnp.float32)
    none = jnp.zeros(0, jnp.int32)
    new, y = gdn_jax.causal_conv1d(
        state, jnp.zeros((0, 5)), GOOD["weight"], slots=none, implementation=path
    )
    assert y.shape == (0, 5)
    assert not new.buffer.any()
