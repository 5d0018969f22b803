"""Texts are the model's own, whatever runs beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_squared import surprise
from engines import (
    MIXED,
    NEW,
    PROMPTS,
    SIZES,
    finish,
    greedy,
    make,
    make_engine,
    mixed,
    prompts,
    tokens,
    write,
)

from gdn_jax import Engine
from gdn_jax.generation import sampling, steps

pytestmark = pytest.mark.usefixtures("exact_products")


@functools.cache
def _log_probabilities(dtype=jnp.float32):
    model, _ = make(dtype=dtype)

    @jax.jit
    def apply(params, rows):
        logits = model.apply({"params": params}, rows).astype(jnp.float32)
        return jax.nn.log_softmax(logits)

    return apply


def _of_whole_texts(requests):
    """[prompt][new token, A]: the model's, from whole texts without any state."""
    rows = np.zeros((len(requests), 96), np.int32)
    for row, request in zip(rows, requests, strict=True):
        whole = [*request.prompt, *request.tokens]
        row[: len(whole)] = whole
    every = _log_probabilities()(make()[1], rows)
    for each, request in zip(np.asarray(every), requests, strict=True):
        begin = len(request.prompt) - 1
        yield each[begin : begin + len(request.tokens)]


def test_greedy_takes_the_models_most_likely_token():
    requests, figures = greedy(0)
    for request, each in zip(requests, _of_whole_texts(requests), strict=True):
        assert request.tokens == each.argmax(-1).tolist()
        assert request.finish_reason == "length"
    assert figures.prefilled == sum(map(len, PROMPTS))
    assert figures.decoded == figures.row_steps == len(PROMPTS) * (NEW - 1)
    assert figures.steps < figures.decoded / 2  # rows went together
    texts = {tuple(text) for text in tokens(requests)}
    assert len(texts) == len(PROMPTS) and min(len(set(x)) for x in texts) > 5


@pytest.mark.parametrize("speculative", [1, 2, 3, 4])
def test_speculative_greedy_is_plain_greedy(speculative):
    requests, figures = greedy(speculative)
    assert tokens(requests) == tokens(greedy(0)[0])
    assert 1.3 < figures.mean_accepted < 0.9 * (1 + speculative)


def test_nothing_is_drafted_amid_a_prompt():
    engine = make_engine(speculative=2)
    [text] = prompts(40)
    request = engine.submit(text, max_tokens=NEW, stop=())
    while request.unread:
        assert not engine.state.drafts.probabilities.any()
        engine.step()
    drafted = engine.state.drafts.probabilities.sum(-1)
    np.testing.assert_allclose(drafted, [[1, 1], *[[0, 0]] * 3], 1e-5)


@pytest.mark.parametrize(("speculative", "programs"), [(0, 1), (2, 2)])
def test_pieces_of_prompts_are_few_programs(speculative, programs):
    engine = make_engine(speculative=speculative, num_positions=88)  # of no other test
    before = steps.prefill._cache_size()
    write(engine, prompts(40, 33, 16, 3), max_tokens=1)
    assert steps.prefill._cache_size() - before == programs


def test_attention_alone_takes_tokens_back():
    """Without a recurrent layer there are no columns to be short of."""
    model, params = make(layer_types=("full_attention",))
    texts = [
        write(
            Engine(model, params, **SIZES, speculative=speculative),
            PROMPTS[:2],
            max_tokens=NEW,
            stop=(),
        )
        for speculative in (0, 2)
    ]
    assert tokens(texts[0]) == tokens(texts[1])


@pytest.mark.parametrize("speculative", [0, 2])
def test_log_probabilities_are_the_models_own(speculative):
    requests = mixed(speculative)
    for request, each in zip(requests, _of_whole_texts(requests), strict=True):
        want = np.take_along_axis(each, np.array(request.tokens)[:, None], 1)[:, 0]
        np.testing.assert_allclose(request.log_probabilities, want, atol=2e-4)


@pytest.mark.parametrize("speculative", [0, 2])
def test_a_text_depends_on_no_other(speculative):
    for i, want in enumerate(mixed(speculative)):
        engine = make_engine(speculative=speculative)
        for _ in range(i % 3):  # another row of the engine
            engine.submit(PROMPTS[0], max_tokens=20, temperature=1.0, seed=9)
        [got] = write(engine, [PROMPTS[i]], [MIXED[i]], **dict(max_tokens=NEW, stop=()))
        assert got.tokens == want.tokens
        assert got.finish_reason == want.finish_reason


def test_rows_that_fill_a_batch_are_left_alone():
    """Three prompts are read as a batch of four, beside a text amid its drafts."""
    engine = make_engine(speculative=2, prefill_tokens=64)
    texts = prompts(3, 9, 1, 7, 16, 2, 11)
    options = [
        dict(max_tokens=limit, temperature=1.0, seed=i, stop=())
        for i, limit in enumerate((NEW, 3, 3, 3, 9, 9, 9))
    ]
    requests = [
        engine.submit(text, **each) for text, each in zip(texts, options, strict=True)
    ]
    engine.step()
    engine.step()
    assert [request.unread for request in engine.requests] == [0, 16, 2, 11]
    assert engine.state.num_accepted[0] > 1
    finish(engine)
    for text, each, request in zip(texts, options, requests, strict=True):
        [alone] = write(make_engine(speculative=2), [text], [each])
        assert alone.tokens == request.tokens


@pytest.mark.parametrize("lengths", [(1, 3, 1, 3), (3, 3, 3, 3)], ids=str)
def test_prompts_as_short_as_steps_are_prompts(lengths):
    """One token, or as many as a step verifies, alone or in all rows, which others
    have written before."""
    engine = make_engine(speculative=2)
    write(engine, PROMPTS[:4], max_tokens=NEW, stop=())
    texts = prompts(*lengths)
    requests = write(engine, texts, max_tokens=NEW, stop=())
    for text, each in zip(requests, _of_whole_texts(requests), strict=True):
        assert text.tokens == each.argmax(-1).tolist()


CUT = [  # of each prompt
    dict(temperature=1.0),
    dict(temperature=1.0),
    dict(temperature=1.5),
    dict(temperature=0.8, top_k=9),
    dict(temperature=1.5, top_p=0.9),
    dict(temperature=1.2, top_p=0.95, top_k=20),
]


@pytest.mark.parametrize("speculative", [0, 2])
def test_samples_are_distributed_as_the_models(speculative):
    """Given the text before it, a token's place in the model's running sum of
    probabilities is uniform, and independent of the places before. Two on end: a
    chi-squared test of 4 x 4 cells."""
    engine = Engine(*_another_head(), speculative=speculative, **SIZES)
    rng, counts = np.random.default_rng(0), np.zeros((4, 4))
    columns = (
        jnp.array([options.get(name, off) for options in CUT], dtype)
        for name, off, dtype in (
            ("temperature", 0, jnp.float32),
            ("top_p", 1, jnp.float32),
            ("top_k", 0, jnp.int32),
        )
    )
    choose = jax.jit(sampling.probabilities)
    of_rows = sampling.Options(*columns)
    for round in range(20):
        options = [dict(seed=6 * round + i) | each for i, each in enumerate(CUT)]
        requests = write(engine, PROMPTS, options, max_tokens=44, stop=())
        every = choose(np.stack(list(_of_whole_texts(requests))), of_rows)
        drawn = np.array(tokens(requests))[..., None]
        places = _places(np.asarray(every, np.float64), drawn, rng)
        pairs = np.minimum(places * 4, 3).astype(int).reshape(-1, 2)
        np.add.at(counts, tuple(pairs.T), 1)
    assert surprise(counts, np.full((4, 4), 1 / 16)) < 1
    assert 1.2 < engine.figures.mean_accepted < 2.5 or not speculative


def _another_head():
    """Drafts by a chain of its own."""
    model, params = make()
    kernel = jnp.flip(params["mtp"]["fc"]["kernel"])
    return model, params | dict(mtp=params["mtp"] | dict(fc=dict(kernel=kernel)))


def _places(p, drawn, rng):
    """Of tokens in the order of their probabilities; within a token's, anywhere."""
    order = np.argsort(-p, axis=-1)
    rank = np.argmax(order == drawn, axis=-1)[..., None]
    p = np.take_along_axis(p, order, axis=-1)
    up_to = np.take_along_axis(np.cumsum(p, axis=-1), rank, axis=-1)
    share = np.take_along_axis(p, rank, axis=-1)
    assert (share > 0).all()
    return (up_to - rng.uniform(size=share.shape) * share)[..., 0]


@pytest.mark.parametrize("speculative", [0, 2])
def test_texts_end_where_they_should(speculative):
    """At the first token, within a block and within a step's drafts."""
    texts = tokens(greedy(0)[0])
    ends = [
        (dict(max_tokens=1, stop=()), "length", 1),
        (dict(max_tokens=NEW, stop=[texts[1][0]]), "stop", 1),
        (dict(max_tokens=1, stop=[texts[2][0]] * 9), "stop", 1),
        *((dict(max_tokens=n, stop=()), "length", n) for n in (2, 7, 8)),
    ]
    requests = write(
        make_engine(speculative=speculative), PROMPTS, [x for x, *_ in ends]
    )
    for request, text, (_, reason, count) in zip(requests, texts, ends, strict=True):
        assert (request.tokens, request.finish_reason) == (text[:count], reason)
    for place in (5, 6, 7):
        stop = [[text[place], 49, 49] for text in texts]
        options = [dict(stop=each, max_tokens=NEW) for each in stop]
        requests = write(make_engine(speculative=speculative), PROMPTS, options)
        for request, text, each in zip(requests, texts, stop, strict=True):
            end = min(text.index(x) for x in each if x in text)
            assert request.tokens == text[: end + 1]
            assert request.finish_reason == "stop"


def test_the_configs_end_of_text_is_the_default():
    requests = write(make_engine(), PROMPTS, max_tokens=NEW)
    wanted = tokens(greedy(0)[0])
    ended = [x[: x.index(48) + 1] if 48 in x else x for x in wanted]
    assert tokens(requests) == ended != wanted


def test_seeds_are_any_ints():
    seeds = [0, 1, 2**32, 2**64 - 1, -1, 2**64]
    options = [dict(seed=seed) for seed in seeds]
    texts = tokens(
        write(
            make_engine(),
            [PROMPTS[0]] * 6,
            options,
            **dict(max_tokens=9, temperature=1.0, stop=()),
        )
    )
    assert texts[3] == texts[4] and texts[5] == texts[0]
    assert len({tuple(text) for text in texts}) == 4


def test_texts_go_on_between_prompts():
    """One of a long text, and prompts without end whose texts are one token."""
    engine = make_engine()
    long = engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    short = [engine.submit(PROMPTS[2], max_tokens=1) for _ in range(60)]
    for _ in engine.run():
        if long.finish_reason:
            break
    assert long.tokens == greedy(0)[0][0].tokens
    assert sum(request.finish_reason is None for request in short) > 30
    finish(engine)
    assert all(request.finish_reason for request in short)
    assert engine.step() == []


def test_bfloat16_diverges_only_where_tokens_are_as_likely(record_property):
    """The first token at which plain and speculative texts differ is reported."""
    model, params = make(dtype=jnp.bfloat16)
    plain, drafted = (
        write(
            Engine(model, params, **SIZES | dict(speculative=speculative)),
            PROMPTS,
            max_tokens=NEW,
            stop=(),
        )
        for speculative in (0, 2)
    )
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for i, (one, other) in enumerate(zip(plain, drafted, strict=True)):
        pairs = enumerate(zip(one.tokens, other.tokens, strict=True))
        place = next((n for n, (x, y) in pairs if x != y), None)
        record_property(f"first divergence of prompt {i}", place)
        if place is None:
            continue
        context = [*one.prompt, *one.tokens[:place]]
        row = np.zeros((1, 96), np.int32)
        row[0, : len(context)] = context
        want = _log_probabilities()(exact, row)[0, len(context) - 1]
        got = _log_probabilities(jnp.bfloat16)(params, row)[0, len(context) - 1]
        error = jnp.abs(got - want).max()
        print(f"prompt {i}: token {place}", error)
        for request in (one, other):
            assert want.max() - want[request.tokens[place]] < 4 * error


def test_the_state_can_be_looked_at():
    engine = make_engine(speculative=2)
    engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    engine.step()
    state = engine.state
    assert state.position[0] == len(PROMPTS[0]) + 1
    assert state.is_active.tolist() == [True, False, False, False]
    assert state.drafts.tokens.shape == (4, 2)
    assert engine.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
