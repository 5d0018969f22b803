"""The models against themselves: however a text is cut into calls, its logits are those
of one call."""

import functools

import flax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gdn_jax import models, testing
from gdn_jax.nn.attention import KVCache

SIZES = dict(
    vocab_size=50,
    hidden_size=24,
    layer_types=("linear_attention", "full_attention"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    partial_rotary_factor=0.5,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
)
EXPERTS = dict(
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=6,
)
CONFIGS = dict(
    qwen3_next=SIZES | EXPERTS | dict(intermediate_size=20, mlp_only_layers=(0,)),
    qwen3_5_text=SIZES | dict(intermediate_size=20, num_mtp_layers=1),
    qwen3_5_moe_text=SIZES | EXPERTS | dict(tie_word_embeddings=True),
)
# Relative RMS of float32: products of other shapes, in other orders.
TOLERANCE = 2e-5

N, L = 3, 30  # sequences and tokens of each
P, S, M = 5, 4, 40  # rows of the state, its columns and positions
ROWS = jnp.array([4, 0, 2])
IDLE = np.array([1, 3])  # the other rows
LENGTHS = np.array([9, 12, 5])  # of prompts, padded to the longest


class Kind:
    """A model, its parameters, sequences and their logits."""

    def __init__(self, model_type, **fields):
        config = models.Config(model_type=model_type, **CONFIGS[model_type] | fields)
        self.model = models.Model(config)
        self.tokens = jax.random.randint(
            jax.random.key(0), (N, L), 0, config.vocab_size
        )
        # numbers large enough for gates, routers and heads to differ
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.tokens)
        draw = np.random.default_rng(1).normal
        self.params = jax.tree.map(
            lambda x: jnp.asarray(draw(0, 0.3, x.shape), x.dtype),
            flax.linen.unbox(shapes),
        )
        self.call = jax.jit(
            functools.partial(self.model.apply, self.params),
            static_argnames=("method", "capture_intermediates"),
        )
        self.want = np.asarray(self.call(self.tokens))

    def poisoned(self):
        """A state that nothing may read."""
        state = self.model.init_state(P, M, drafts=S - 1)
        layers = tuple(poison(layer) for layer in state.layers)
        return models.ModelState(layers, state.length + 7)

    def prefill(self, **options):
        """Prompts of three lengths, whose padding is not what follows them."""
        longest = LENGTHS.max()
        is_padding = np.arange(longest) >= LENGTHS[:, None]
        return self.call(
            jnp.where(is_padding, 0, self.tokens[:, :longest]),
            self.poisoned(),
            rows=ROWS,
            num_tokens=jnp.asarray(LENGTHS),
            has_state=jnp.zeros(N, bool),
            **options,
        )

    def agrees(self, logits, sequence, first):
        """Whether these are a sequence's logits from a token on."""
        want = self.want[sequence, first : first + len(logits)]
        return testing.relative_error(logits, want) < TOLERANCE


make = functools.cache(Kind)


@pytest.fixture(params=CONFIGS)
def kind(request):
    return make(request.param)


def poison(layer):
    """Values of a cache are finite, whatever a sequence was; see `KVCache`."""
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), layer)
    if isinstance(layer, KVCache):
        spoiled = spoiled._replace(v=jnp.full_like(layer.v, 1e30))
    return spoiled


def bits(state, rows):
    """All that a state holds of some sequences."""
    return [
        np.asarray(x).reshape(P, -1)[rows].view(np.uint32)
        for x in jax.tree.leaves(state)
    ]


def same(left, right):
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


def in_rows(values, rest=0):
    """[P ..]: each sequence's in its row."""
    values = jnp.asarray(values)
    return jnp.full((P, *values.shape[1:]), rest, values.dtype).at[ROWS].set(values)


def test_ragged_prefill_begins_rows_whatever_they_hold(kind):
    logits, state = kind.prefill()
    for n, length in enumerate(LENGTHS):
        assert kind.agrees(logits[n, :length], n, 0)
    assert state.length[ROWS].tolist() == LENGTHS.tolist()
    assert same(bits(state, IDLE), bits(kind.poisoned(), IDLE))


def test_padding_takes_no_expert():
    _, captured = make("qwen3_next").prefill(capture_intermediates=True)
    [y] = captured["intermediates"]["layers_1"]["mlp"]["__call__"]
    is_live = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    np.testing.assert_array_equal(np.any(y, axis=-1), is_live)


def test_idle_rows_are_left_as_they_are(kind):
    """Decoding of all rows, of which two hold NaN, and later three."""
    _, state = kind.prefill()
    position = LENGTHS.copy()
    for live in ([1, 1, 1], [1, 0, 1], [1, 1, 1]):
        token = in_rows(kind.tokens[np.arange(N), position][:, None])
        logits, new = kind.call(token, state, takes_part=in_rows(live) > 0)
        for n in np.flatnonzero(live):
            assert kind.agrees(logits[ROWS[n]], n, position[n])
        idle = np.setdiff1d(np.arange(P), ROWS[np.flatnonzero(live)])
        assert same(bits(new, idle), bits(state, idle))
        state, position = new, position + live
    assert state.length[ROWS].tolist() == position.tolist()


def test_speculative_steps_are_decoding(kind):
    """Every count of accepted tokens in every row; rows wait in between."""
    _, state = kind.prefill()
    position, last = LENGTHS.copy(), np.ones(N, np.int32)
    for accepted in ([1, 2, 3], [2, 0, 4], [3, 4, 0], [4, 3, 1], [0, 1, 2]):
        accepted = np.array(accepted, np.int32)
        counted = np.where(accepted > 0, np.minimum(accepted + 1, S), 0)
        tokens = np.stack([kind.tokens[n, i : i + S] for n, i in enumerate(position)])
        tokens[np.arange(S) >= accepted[:, None]] += 1  # drafts that are wrong
        logits, new = kind.call(
            in_rows(tokens),
            state,
            num_tokens=in_rows(counted.astype(np.int32)),
            num_accepted=in_rows(last, rest=1),
        )
        for n in np.flatnonzero(accepted):
            assert kind.agrees(logits[ROWS[n], : accepted[n]], n, position[n])
        idle = np.setdiff1d(np.arange(P), ROWS[np.flatnonzero(accepted)])
        assert same(bits(new, idle), bits(state, idle))
        state, position = new, position + accepted
        last = np.where(accepted > 0, accepted, last)


def test_rows_go_on_and_begin_in_one_call():
    """Without num_tokens, in rows of any order."""
    kind = make("qwen3_5_text")
    _, state = kind.prefill()
    first = LENGTHS[2], 0
    tokens = jnp.stack([kind.tokens[2, first[0] :][:6], kind.tokens[0, :6]])
    logits, state = kind.call(
        tokens, state, rows=jnp.array([2, 3]), has_state=jnp.array([True, False])
    )
    assert kind.agrees(logits[0], 2, first[0])
    assert kind.agrees(logits[1], 0, 0)
    assert state.length.tolist() == [LENGTHS[1], 7, first[0] + 6, 6, LENGTHS[0]]


def test_drafts_in_rows_are_those_of_whole_sequences():
    kind = make("qwen3_5_text")
    T = LENGTHS.max()
    hidden, _ = kind.call(kind.tokens, method="hidden")
    want, _ = kind.call(kind.tokens[:, 1:], hidden[:, :-1], method="draft")
    cache = kind.model.init_draft_cache(P, M)
    cache = tuple(poison(layer) for layer in cache)
    start = jnp.zeros(N, jnp.int32)
    for counted in (LENGTHS, np.array([7, 0, 12])):
        at = start[:, None] + jnp.arange(T)
        got, cache = kind.call(
            jnp.take_along_axis(kind.tokens, at + 1, axis=1),
            jnp.take_along_axis(hidden, at[..., None], axis=1),
            cache,
            start=start,
            rows=ROWS,
            num_tokens=jnp.asarray(counted),
            method="draft",
        )
        for n, count in enumerate(counted):
            wanted = want[n, start[n] : start[n] + count]
            assert testing.relative_error(got[n, :count], wanted) < TOLERANCE
        start = start + counted


def test_tokens_outside_the_vocabulary_are_its_ends():
    kind = make("qwen3_5_text")
    outside = kind.tokens.at[:, 3].set(-2).at[:, 5].set(99)
    ends = kind.tokens.at[:, 3].set(0).at[:, 5].set(49)
    np.testing.assert_array_equal(kind.call(outside), kind.call(ends))
    hidden, _ = kind.call(ends, method="hidden")
    drafts = [
        kind.call(tokens[:, 1:], hidden[:, :-1], method="draft")[0]
        for tokens in (outside, ends)
    ]
    np.testing.assert_array_equal(*drafts)


@functools.partial(jax.jit, static_argnums=0)
def gradient(apply, params, tokens):
    def loss(params):
        logits = jax.nn.log_softmax(apply(params, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    return jax.grad(loss)(params)


def test_every_parameter_has_a_finite_gradient(kind):
    found = gradient(kind.model.apply, kind.params, kind.tokens)
    for path, x in flax.traverse_util.flatten_dict(found, sep="/").items():
        assert np.isfinite(x).all(), path
        assert np.any(x) != path.startswith("params/mtp/"), path
    if kind is make("qwen3_next"):
        again = jax.checkpoint(kind.model.apply)
        again = gradient(again, kind.params, kind.tokens)
        errors = jax.tree.leaves(jax.tree.map(testing.relative_error, again, found))
        assert max(errors) < TOLERANCE


@pytest.mark.parametrize("recurrent", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_call_keeps_the_state_in_shape_and_dtype(dtype, recurrent):
    kind = make("qwen3_next")
    model = kind.model.clone(dtype=jnp.dtype(dtype))
    state = jax.eval_shape(
        lambda: model.init_state(N, M, drafts=1, recurrent_dtype=recurrent)
    )
    assert state.layers[0].recurrent.dtype == recurrent
    tokens = jax.ShapeDtypeStruct((N, 2), jnp.int32)
    logits, new = jax.eval_shape(model.apply, kind.params, tokens, state)
    assert logits.shape == (N, 2, 50)
    assert logits.dtype == dtype
    assert new == state


def integers(*shape):
    return np.zeros(shape, np.int32)


WRONG = {
    "tokens of one axis": (dict(tokens=integers(2)), "tokens must be"),
    "no tokens": (dict(tokens=integers(2, 0)), r"one at least; got \(2, 0\)"),
    "a state that is none": (dict(state=3), "state must be a ModelState; got a int"),
    "tokens that are floats": (dict(tokens=np.zeros((2, 3))), "tokens must be int32"),
    "other sequences than the state's": (dict(tokens=integers(3, 1)), "Give rows"),
    "rows of another number": (dict(rows=integers(1)), "rows must be"),
    "rows that are floats": (dict(rows=np.zeros(2)), "rows must be int32"),
    "a row twice": (dict(rows=integers(2)), r"all different and .*; got \[0, 0\]"),
    "a row of no sequence": (
        dict(rows=np.array([0, 2], np.int32)),
        r"in \[0, 2\); got \[0, 2",
    ),
    "more tokens than positions": (
        dict(tokens=integers(2, M + 1)),
        f"tokens must be at most num_positions = {M}; got T = {M + 1}",
    ),
    "more tokens than positions, or none": (
        dict(tokens=integers(2, M + 1), takes_part=np.ones(2, bool)),
        "num_positions",
    ),
    "num_tokens of two axes": (dict(num_tokens=integers(2, 1)), "num_tokens must be"),
    "has_state of numbers": (dict(has_state=integers(2)), "has_state must be bool"),
    "takes_part of numbers": (dict(takes_part=integers(2)), "takes_part must be bool"),
    "both counts": (
        dict(num_tokens=integers(2), takes_part=np.ones(2, bool)),
        "one of the two",
    ),
    "tables without a state": (dict(state=None, rows=integers(2)), "init_state"),
    "num_accepted without a state": (
        dict(state=None, num_accepted=integers(2)),
        "init_state",
    ),
    "more tokens than columns": (
        dict(tokens=integers(2, 4), num_accepted=integers(2)),
        "drafts",
    ),
    "no head": (
        dict(method="draft", next_tokens=integers(2, 3), hidden=jnp.zeros((2, 3, 24))),
        "num_mtp_layers",
    ),
}


def test_taking_part_is_having_all_tokens(kind):
    """Speculative steps, dense and in rows."""
    _, state = kind.prefill()
    tokens = in_rows(kind.tokens[:, 20 : 20 + S])
    live, last = in_rows([1, 0, 1]), in_rows([1, 1, 1], rest=1)
    counted = dict(num_tokens=live * S), dict(takes_part=live > 0)
    (want, want_state), (got, got_state) = (
        kind.call(tokens, state, num_accepted=last, **each) for each in counted
    )
    rows = np.asarray(ROWS)[[0, 2]]
    assert testing.relative_error(got[rows], want[rows]) < TOLERANCE
    leaves = map(jax.tree.leaves, (got_state, want_state))
    for each, wanted in zip(*leaves, strict=True):
        each, wanted = (np.asarray(x).reshape(P, -1)[rows] for x in (each, wanted))
        # what nothing was written over: NaN, and values of 1e30
        rests = ~(np.abs(wanted) < 1e9)
        assert np.array_equal(rests, ~(np.abs(each) < 1e9))
        each, wanted = (np.where(rests, 0, x) for x in (each, wanted))
        assert testing.relative_error(each, wanted) < TOLERANCE
    assert same(bits(got_state, ROWS[1:2]), bits(state, ROWS[1:2]))


def test_padding_needs_no_positions():
    kind = make("qwen3_5_text")
    tokens = jnp.pad(kind.tokens, ((0, 0), (0, M + 1 - L)))
    state = kind.model.init_state(N, M)
    logits, _ = kind.call(tokens, state, num_tokens=jnp.full(N, L, jnp.int32))
    for n in range(N):
        assert kind.agrees(logits[n, :L], n, 0)


@pytest.mark.parametrize(("change", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_says_what_to_do(change, told, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    kind = make("qwen3_next")
    call = dict(tokens=integers(2, 3), state=kind.model.init_state(2, M, drafts=2))
    call = change if "method" in change else call | change
    with pytest.raises(ValueError, match=told):
        kind.model.apply(kind.params, **call)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (dict(num_rows=0), "num_rows must be an int >= 1; got 0"),
        (dict(num_positions=1.5), "num_positions must be an int >= 1; got 1.5"),
        (dict(drafts=-1), "drafts must be >= 0; got -1"),
    ],
)
def test_wrong_sizes_of_a_state_are_told(sizes, told, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=told):
        make("qwen3_next").model.init_state(**dict(num_rows=1, num_positions=4) | sizes)
