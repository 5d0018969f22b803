"""What calls of a layer's step take a `ReplayState`, and what others are told."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_steps import KERNELS
from replay_step_calls import N, of_decode

from gdn_jax import (
    LayerStepConfig,
    ReplayConfig,
    ReplayState,
    fused_layer_step,
    testing,
)
from gdn_jax.nn import GatedDeltaNet, arguments
from gdn_jax.ops.gated_delta.replay_tuning import replay_heuristic
from gdn_jax.ops.layer_step import tuning

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(slots=np.zeros((N, 2), np.int32)),
            r"slots must be \[N\], one slot a row",
        ),
        (dict(tokens=2), "num_accepted must be given with a ReplayState"),
        (dict(H=1), r"state\[1\].k must be H = 2, as state\[0\] has channels of"),
        (dict(key_dtype="bfloat16"), "qkvz must be of a dtype that bfloat16 holds"),
        (dict(per_key_decay=True), r"state\[1\].log_decay must be \[P, HV, R\]"),
        (dict(config=LayerStepConfig(32, 2, 4)), "config must be a ReplayConfig"),
    ],
    ids=str,
)
def test_a_wrong_call_is_told_what_is_wrong(change, text):
    (conv, recurrent), tokens, options = of_decode()
    made = dict(num_key_heads=2, key_dtype="float32")
    made |= {name: x for name, x in change.items() if name in (*made, "per_key_decay")}
    if "H" in change:
        made["num_key_heads"] = change["H"]
    state = conv, ReplayState.from_dense(recurrent.checkpoint, **made)
    options |= {name: x for name, x in change.items() if name in ("slots", "config")}
    if "tokens" in change:
        buffer = jnp.concatenate([conv.buffer] * 2, axis=2)
        state = conv._replace(buffer=buffer), state[1]
        tokens = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), tokens)
    with pytest.raises(ValueError, match=text):
        fused_layer_step(state, *tokens, **options)


def test_a_launch_of_arrays_is_not_taken_for_replays():
    (conv, recurrent), tokens, options = of_decode()
    options |= dict(config=ReplayConfig(), implementation="interpret")
    with pytest.raises(ValueError, match="config must be a LayerStepConfig"):
        fused_layer_step((conv, recurrent.checkpoint), *tokens, **options)


def test_there_is_no_gradient(path):
    state, tokens, options = of_decode()

    def total(tokens):
        call = options | dict(implementation=path)
        return jnp.sum(fused_layer_step(state, *tokens, **call)[1])

    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.grad(total)(tokens)


def test_an_empty_call_gives_the_state_back(path):
    state, (qkvz, ba), options = of_decode()
    tokens = jax.tree.map(lambda x: x[:0], (qkvz, ba))
    options |= dict(slots=options["slots"][:0], implementation=path)
    new, out = fused_layer_step(state, *tokens, **options)
    assert out.shape == (0, 1, 128)
    for old, kept in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert np.array_equal(old, kept, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_calls_under_vmap_are_calls_apart(kernel):
    state, tokens, options = of_decode()
    state = jax.tree.map(jnp.nan_to_num, state)
    options |= dict(implementation=kernel)

    def run(state, tokens):
        return fused_layer_step(state, *tokens, **options)

    both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (state, tokens))
    got = jax.vmap(run)(*both)
    for i in range(2):
        want = run(*jax.tree.map(lambda x, i=i: x[i], both))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert testing.relative_error(x[i], y) < 1e-5


def test_it_runs_where_jax_counts_in_64_bits():
    """And computes nothing in them."""
    state, tokens, options = of_decode()
    step = functools.partial(fused_layer_step, implementation="interpret", **options)
    want = step(state, *tokens)
    with jax.enable_x64(True):
        got = step(state, *tokens)
        assert not re.search(r":f64\[\d", str(jax.make_jaxpr(step)(state, *tokens)))
    pairs = jax.tree.leaves(got), jax.tree.leaves(want)
    for x, y in zip(*pairs, strict=True):
        x, y = (np.nan_to_num(np.array(z)) for z in (x, y))
        assert x.dtype == y.dtype and testing.relative_error(x, y) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_takes_it_where_it_pays(kernel, monkeypatch):
    """Prompts are read in chunks."""
    steps, S = [], 3

    def pays(implementation, arrays, step):
        assert implementation == kernel
        steps.append(step)
        return True

    layer = GatedDeltaNet(48, 2, 4, 32, 32, layout="interleaved")
    x = jax.random.normal(jax.random.key(0), (N, 5 + 4 * S, 48))
    params = layer.init(jax.random.key(1), x[:, :1])
    monkeypatch.setattr(arguments, "pays", pays)
    slots = np.int32([3, 0, 2, 4])
    outs, rings = {}, {}
    for name in (kernel, "xla"):
        if name == "xla":
            monkeypatch.setattr(arguments, "pays", lambda *_: False)
        apply = jax.jit(functools.partial(layer.apply, params, implementation=name))
        state = layer.init_state(5, columns=S, decode="replay")
        y, state = apply(x[:, :5], state, slots=slots)
        outs[name] = [y]
        for i in range(4):
            tables = dict(slots=slots, num_accepted=jnp.full(N, 1 + min(i, S - 1)))
            at = 5 + i * S
            y, state = apply(x[:, at : at + S], state, **tables)
            outs[name].append(y)
        rings[name] = state.conv.to_dense(4)[slots]
    assert [(step.tokens, step.replay) for step in steps] == [(S, True)]
    assert np.array_equal(*rings.values())
    for got, want in zip(*outs.values(), strict=True):
        error = testing.relative_error(got, want)
        assert error < testing.TOLERANCE["chunked out", "float32"]


def test_the_table_tells_replays_rows_from_others(monkeypatch):
    row = dict(K=128, V=128, state_dtype="float32", group=2, tokens=4, programs=64)
    of_arrays = tuning.Tuned(
        **row, config=LayerStepConfig(32, 2, 4), pays=False, reason=""
    )
    of_replay = dataclasses.replace(
        of_arrays, config=ReplayConfig(), pays=True, replay=True
    )
    monkeypatch.setattr(tuning, "table", lambda kind: (of_arrays, of_replay))
    step = tuning.Step(2, 4, 4, True, 16, 32, 128, 128, "float32")
    assert tuning.find_tuned("any", step) is of_arrays
    step = dataclasses.replace(step, replay=True)
    assert tuning.find_tuned("any", step) is of_replay
    assert tuning.find_config("any", step) == ReplayConfig()
    for other in (dict(window=32), dict(act_dtype="float32"), dict(tokens=None)):
        unlike = dataclasses.replace(step, **other)
        most = unlike.tokens or 32
        dtypes = unlike.act_dtype, unlike.state_dtype
        assert tuning.find_config("any", unlike) == replay_heuristic(most, *dtypes, 2)
