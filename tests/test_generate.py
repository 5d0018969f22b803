"""`generate` and its errors, in a few lines around what the engine's tests prove."""

import inspect
import signal
import subprocess
import sys
import types

import flax.linen
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from engines import make, prompts, tokens, write

import gdn_jax
from gdn_jax.generation import steps
from gdn_jax.generation.api import Result, make_engine, prompt_seed

PROMPTS = prompts(3, 16, 1, 7)
NEW = 40

pytestmark = pytest.mark.usefixtures("exact_products")


def _generate(prompts=PROMPTS, **options):
    return gdn_jax.generate(*make(), prompts, **dict(max_tokens=NEW) | options)


@pytest.mark.parametrize(
    "options", [dict(max_tokens=9), dict(temperature=1.0, top_k=9, top_p=0.9)]
)
def test_texts_are_an_engines(options):
    model, params = make()
    engine = gdn_jax.Engine(model, params, num_rows=4, num_positions=256)
    seeds = [dict(seed=prompt_seed(5, i)) for i in range(len(PROMPTS))]
    want = write(engine, PROMPTS, seeds, **dict(max_tokens=NEW) | options)
    assert _generate(seed=5, **options) == tokens(want)
    results = _generate(seed=5, details=True, **options)
    assert results == [
        Result(x.tokens, x.log_probabilities, x.finish_reason) for x in want
    ]
    assert {result.finish_reason for result in results} == {"stop", "length"}


def test_speculative_texts_are_the_same():
    assert _generate(speculative=1) == _generate()


def test_ends():
    ends = _generate()
    texts = _generate(stop=())
    assert [len(text) for text in texts] == [NEW] * len(PROMPTS)
    assert ends == [x[: x.index(48) + 1] if 48 in x else x for x in texts]
    stop = [texts[0][2], texts[1][4], 1, 2]
    firsts = (min(x.index(y) for y in stop if y in x) for x in texts)
    assert _generate(stop=stop) == [
        x[: n + 1] for x, n in zip(texts, firsts, strict=True)
    ]


def test_tokens_are_streamed():
    calls, texts = [], [[] for _ in PROMPTS]

    def on_tokens(index, new):
        calls.append(index)
        texts[index] += new

    assert _generate(on_tokens=on_tokens, stop=()) == texts
    assert calls == [0, 1, 2, 3] * 4  # the first tokens, then blocks of 16


def test_prompts_draw_with_keys_of_their_own():
    options = dict(temperature=1.0, stop=())
    same = [PROMPTS[0]] * 4
    texts = _generate(same, **options)
    assert len({tuple(text) for text in texts}) == 4
    assert _generate([*same[:3], [9]], **options)[:3] == texts[:3]
    assert _generate(same, seed=1, **options)[0] != texts[0]
    assert _generate(same, seed=-1, **options) == _generate(
        same, seed=2**64 - 1, **options
    )
    seeds = {prompt_seed(seed, i) for seed in (0, 1, 2**32, 7 << 32) for i in range(9)}
    assert len(seeds) == 36


def test_calls_of_like_sizes_compile_once():
    for temperature in (0.0, 1.0):
        _generate(temperature=temperature)
    decode = steps.decode.of(make()[0])
    sizes = steps.prefill._cache_size(), decode._cache_size()
    _generate(prompts(5, 2, 9, 12), max_tokens=99, temperature=0.5, stop=(1, 2))
    assert (steps.prefill._cache_size(), decode._cache_size()) == sizes


@pytest.mark.parametrize(
    ("lengths", "asked", "wanted"),
    [
        ((3, 1, 2), dict(max_tokens=253), (4, 256, 4)),
        ((3, 1, 2), dict(max_tokens=253, drafts=1), (4, 512, 4)),
        ((9,) * 99, dict(max_tokens=1), (64, 256, 4)),
        ((9,), dict(max_tokens=600, num_rows=3, stop=range(7)), (3, 768, 7)),
    ],
)
def test_an_engine_has_room_for_what_is_asked(lengths, asked, wanted):
    engine = make_engine(*make(), prompts(*lengths), **dict(drafts=0) | asked)
    sizes = engine.sizes
    assert (sizes.num_rows, sizes.num_positions, sizes.max_stop) == wanted
    assert sizes.speculative == asked.get("drafts", 0)


def test_prompts_wait_for_rows():
    firsts = [text[:1] for text in _generate()]
    assert _generate(PROMPTS * 2, num_rows=4, max_tokens=1) == firsts * 2


def test_no_prompts_no_texts():
    assert _generate([]) == _generate([], details=True) == []


def test_arrays_are_prompts():
    assert _generate([np.array(x) for x in PROMPTS]) == _generate()


def test_ctrl_c_comes_once_what_was_written_is_given(interruptible):
    before, given = signal.getsignal(signal.SIGINT), []
    prefill = steps.prefill

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return prefill(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "prefill", interrupted)
        _generate(on_tokens=lambda index, new: given.append((index, new)))
    assert sorted(given) == [(i, text[:1]) for i, text in enumerate(_generate())]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(prompts=[1, 2]), r"prompts must be a list of lists of token ids; got \["),
        (dict(prompts="a text"), "prompts must be a list of lists .*; got 'a text'"),
        (dict(prompts=[[1], "a"]), r"prompts must .* got \[\[1\], 'a'\]. Encode each"),
        (dict(prompts=3), r"prompts must .* got 3.* give one as \[ids\]"),
        (dict(prompts=[[1.5]]), r"prompts\[0\] must be a list of token ids; got"),
        (dict(on_tokens=3), "on_tokens must be a function or None; got 3"),
        (dict(prompts=[[1], [50]]), r"prompts\[1\] must be token ids in \[0, 50\)"),
        (dict(prompts=[[]]), r"prompts\[0\] must be one token at least"),
        (dict(max_tokens=0), "max_tokens must be an int >= 1"),
        (dict(temperature=-1), "temperature must be finite in float32, >= 0"),
        (dict(temperature=1e39), "temperature must be finite in float32, >= 0"),
        (dict(stop=[[1], [2, 3]]), "stop must be a list of token ids"),
        (
            dict(max_tokens=32760),
            r"prompts\[1\] must be at most max_position_embeddings = 32768 tokens in "
            "all; got 16 tokens, with 32760 new ones",
        ),
        (dict(speculative=None), "speculative must be an int; got None"),
        (dict(seed=0.5), "seed must be an int"),
        (dict(stop=[-1]), r"stop must be token ids in \[0, 50\)"),
        (dict(num_rows=0), "num_rows must be an int >= 1"),
    ],
)
def test_a_wrong_call_is_told(change, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=text):
        _generate(**change)


def test_what_is_no_model_or_not_its_parameters_is_told(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, params = make()
    _, others = make(hidden_size=32, tie_word_embeddings=True)
    stranger = params | dict(
        head=dict(kernel=params["head"]["kernel"], bias=jnp.zeros(1))
    )
    for wrong, text in (
        ((params, model), "model must be a gdn_jax.models.Model; got a dict. Give"),
        ((model, types.MappingProxyType(params)), "params must be a tree of param"),
        ((model, params | {3: jnp.zeros(1)}), "model's: 3 is no parameter. Give model"),
        (
            (model, params | dict(norm=dict(weight=1.0))),
            "norm/weight is a float, ",
        ),
        (
            (model, params | dict(norm=dict(weight=None))),
            "is a NoneType, wanted",
        ),
        ((model, None), "params must be a tree of parameters; got a NoneType. Give"),
        ((model, dict(params=params)), "it under 'params'. Give params.'params'"),
        ((model, stranger), "not this model's: head/bias is no parameter. Give model"),
        ((model, others), r"is \(50, 32\), wanted \(50, 24\); head/kernel is missing"),
    ):
        for call in (gdn_jax.Engine, lambda *x: gdn_jax.generate(*x, [], max_tokens=1)):
            with pytest.raises(ValueError, match=text):
                call(*wrong)


def test_parameters_may_be_in_boxes():
    model, params = make()
    boxed = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    boxed = flax.linen.meta.replace_boxed(boxed, params)
    assert gdn_jax.generate(model, boxed, PROMPTS, max_tokens=NEW) == _generate()


def test_names_that_need_flax_are_lazy():
    code = (
        "import sys, gdn_jax; assert {'generate', 'Engine'} <= set(dir(gdn_jax));"
        "assert 'flax' not in sys.modules; gdn_jax.Engine; assert 'flax' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert {"generate", "Engine"} <= set(gdn_jax.__all__)
    assert list(inspect.signature(gdn_jax.generate).parameters)[:3] == [
        "model",
        "params",
        "prompts",
    ]
    with pytest.raises(AttributeError, match="no attribute 'generates'"):
        gdn_jax.generates  # noqa: B018
