"""What calls of a layer's step are taken, by what, and what others are told."""

import dataclasses
import functools
import itertools
import types
from typing import Any

import aot
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from layer_steps import KERNELS, Case, make

import gdn_jax
from gdn_jax import ConvState, LayerStepConfig, fused_layer_step, testing
from gdn_jax.nn import GatedDeltaNet, arguments
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta.tuning import check_registers
from gdn_jax.ops.layer_step import conv, tuning

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(layout="apart"), "layout must be one of interleaved, flat; got 'apart'"),
        (dict(qkvz=(1, 100)), r"qkvz must be \[N, T, 384\] or \[L, 384\]"),
        (dict(ba=(3, 1, 5)), r"ba must be \[N, T, 8\] or \[L, 8\], the leading axes"),
        (dict(ba_dtype="bfloat16"), "ba must be qkvz's float32; got bfloat16"),
        (dict(norm_weight=(8,)), r"norm_weight must be \[V\] = \(32,\); got \(8,\)"),
        (dict(A_log=(3,)), r"A_log must be \[HV\] = \(4,\); got \(3,\)"),
        (
            dict(conv_weight=(100, 4)),
            r"conv_weight must be \[C, W\] with C = 256 .*; got \(100, 4\)",
        ),
        (dict(eps=0.0), "eps must be a finite number > 0; got 0.0"),
        (dict(eps=float("inf")), "eps must be a finite number > 0; got inf"),
        (dict(activation="tanh"), "activation must be one of silu, sigmoid"),
        (dict(slots=(3, 2)), r"slots must be \[N\] where num_accepted is None"),
        (
            dict(slots=(3, 2), num_accepted=(3,)),
            r"slots must be \[N, S\] of at most its S",
        ),
        (dict(num_accepted=(3,)), r"num_accepted must be given with slots \[N, S\]"),
        (dict(start=(3,)), r"state\[0\].start must be \[P\] = \(5,\); got \(3,\)"),
        (dict(slots=None), "state must be one state per row where slots is None"),
        (dict(triple=True), "qkvz must be an array, or with ba a tuple of two"),
        (dict(qkvz=(3, 2, 384), ba=(3, 2, 8)), "got T = 2 with room for S = 1 tokens"),
        (dict(slots=(2,)), r"slots must be \[N\] with N = 3; got \(2,\)"),
        (dict(channels=100), r"state\[0\].buffer must be \[P, C, R\] with C = 2 H K"),
        (dict(pool=(5, 0, 32, 32)), r"state\[0\].buffer must be .* of HV = 0"),
        (dict(pool=(5, 4, 0, 32)), r"state\[0\].buffer must be .* V = 0"),
        (dict(listed=True), "qkvz must be an array, or with ba a tuple of two"),
        (dict(pool=(4, 32, 32)), r"state\[1\] must be \[P or N, HV, V, K\]"),
        (dict(state=None), r"state must be \(ConvState, pool\); got NoneType"),
        (dict(pair=True), "qkvz must be an array, or with ba a tuple of two"),
    ],
    ids=str,
)
def test_a_wrong_call_is_told_what_is_wrong(change, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    (conv, pool), step = make(Case("plain"))
    (qkvz, ba), options = step(0)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    if "channels" in change:
        conv = ConvState.zeros(5, change["channels"], 4, jnp.float32)
    pool = zeros(change["pool"]) if "pool" in change else pool
    qkvz = zeros(change["qkvz"]) if "qkvz" in change else qkvz
    ba = zeros(change["ba"]) if "ba" in change else ba
    ba = ba.astype(change.get("ba_dtype", ba.dtype))
    qkvz = (qkvz, qkvz) if "pair" in change else qkvz
    for name in ("norm_weight", "A_log", "conv_weight"):
        if name in change:
            options[name] = zeros(change[name])
    qkvz, ba = ((qkvz,) * 3, (ba,) * 3) if "triple" in change else (qkvz, ba)
    qkvz, ba = ([qkvz] * 2, [ba] * 2) if "listed" in change else (qkvz, ba)
    if "start" in change:
        conv = conv._replace(start=jnp.zeros(change["start"], jnp.int32))
    for name in ("slots", "num_accepted"):
        if name in change:
            shape = change[name]
            options[name] = None if shape is None else jnp.zeros(shape, jnp.int32)
    for name in ("layout", "eps", "activation"):
        options |= {name: change[name]} if name in change else {}
    state = change.get("state", (conv, pool))
    with pytest.raises(ValueError, match=text):
        fused_layer_step(state, qkvz, ba, **options)


def test_what_the_kernel_cannot_take_is_told_and_runs_as_ops():
    state, step = make(Case("wide", (1,), heads=(1, 1, 16, 300)))
    tokens, options = step(0)
    with pytest.raises(NotImplementedError, match="V = 300, of which it has registers"):
        fused_layer_step(state, *tokens, implementation="interpret", **options)
    fused_layer_step(state, *tokens, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("layout", "drafts"), [("flat", 0), ("interleaved", 3), ("separate", 0)]
)
def test_a_layer_takes_it_where_it_pays(layout, drafts, kernel, monkeypatch):
    """Never for prompts, and not with matrices for each of q, k and v."""
    steps = []

    def pays(implementation, arrays, step):
        assert implementation == kernel
        steps.append(step)
        return step.tokens == 1 + drafts

    layer = GatedDeltaNet(48, 2, 4, 32, 32, layout=layout)
    N, S = 3, 1 + drafts
    x = jax.random.normal(jax.random.key(0), (N, 5 + 3 * S, 48))
    params = layer.init(jax.random.key(1), x[:, :1])
    monkeypatch.setattr(arguments, "pays", pays)
    table = jnp.arange(N * S, dtype=jnp.int32)[::-1].reshape(N, S)
    outs, rings = {}, {}
    for name in (kernel, "xla"):
        apply = jax.jit(functools.partial(layer.apply, params, implementation=name))
        if name == "xla":
            monkeypatch.setattr(arguments, "pays", lambda *_: False)
        state = layer.init_state(N * S, columns=S)
        y, state = apply(x[:, :5], state, slots=table[:, 0])
        outs[name] = [y]
        for i in range(3):
            tables = dict(slots=table, num_accepted=jnp.full(N, 1 + min(i, drafts)))
            tables = tables if drafts else dict(slots=table[:, 0])
            at = 5 + i * S
            y, state = apply(x[:, at : at + S], state, **tables)
            outs[name].append(y)
        rings[name] = state.conv.to_dense(4)[table[:, 0]]
    if layout == "separate":
        assert not steps
    else:  # traced once each
        assert [step.tokens for step in steps] == [5, 1 + drafts]
    assert np.array_equal(*rings.values())
    for got, want in zip(*outs.values(), strict=True):
        assert testing.relative_error(got, want) < testing.TOLERANCE["out", "float32"]


@pytest.mark.parametrize("empty", ["rows", "tokens", "packed"])
def test_an_empty_call_gives_the_state_back(empty, path):
    state, step = make(Case("plain"))
    (qkvz, ba), options = step(0)
    if empty == "rows":
        options["slots"], tokens = options["slots"][:0], (qkvz[:0], ba[:0])
    elif empty == "tokens":
        tokens = qkvz[:, :0], ba[:, :0]
    else:
        tokens = qkvz[:0, 0], ba[:0, 0]
        options["cu_seqlens"] = jnp.zeros(4, jnp.int32)
    new, out = fused_layer_step(state, *tokens, implementation=path, **options)
    assert out.shape == (*tokens[0].shape[:-1], 128)
    for old, kept in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert np.array_equal(old, kept, equal_nan=True)


def test_the_names_are_public():
    assert {"fused_layer_step", "LayerStepConfig"} <= set(gdn_jax.__all__)


STEP = tuning.Step(4, 1, 1, False, 2, 4, 128, 128, "float32")
SMALL, LARGE = LayerStepConfig(32, 2, 4), LayerStepConfig(64, 2, 8)


@pytest.fixture
def measured(monkeypatch):
    """What a device's table says."""

    def row(tokens, programs, config, pays, dtype="float32", group=2):
        return tuning.Tuned(128, 128, dtype, group, tokens, programs, config, pays, "")

    rows = (
        row(1, 16, SMALL, True),
        row(1, 256, LARGE, False),
        row(4, 16, LARGE, True),
        row(1, 16, LARGE, True, "bfloat16"),
    )
    tables = {"NVIDIA H200": rows}
    monkeypatch.setattr(tuning, "table", lambda kind: tables.get(kind, ()))
    monkeypatch.setattr(tuning._triton, "device_kind", lambda arrays: "NVIDIA H200")


@pytest.mark.parametrize(
    ("change", "launch", "pays"),
    [
        (dict(), SMALL, True),
        (dict(rows=5), LARGE, False),  # 20 programs: the next row's
        (dict(rows=1000), LARGE, False),  # past the last
        (dict(tokens=3, columns=4, verifies=True), LARGE, True),
        (dict(tokens=3, columns=4), LARGE, False),  # may be a prompt
        (dict(tokens=None, columns=4, verifies=True), LARGE, False),
        (dict(tokens=5, columns=5, verifies=True), None, False),  # not measured
        (dict(state_dtype="float16"), LARGE, True),  # bfloat16's
        (dict(act_dtype="float32"), None, False),
        (dict(HV=8), None, False),
        (dict(K=64), None, False),
    ],
    ids=str,
)
def test_a_step_takes_what_was_measured(change, launch, pays, measured):
    step = dataclasses.replace(STEP, **change)
    plain = tuning.heuristic(step.K, step.V, step.tokens or step.columns)
    assert tuning.find_config("NVIDIA H200", step) == (launch or plain)
    assert tuning.pays(None, (), step) == tuning.pays("triton", (), step) == pays
    assert not tuning.pays("xla", (), step)
    assert tuning.find_config("another", step) == plain


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9])
def test_every_size_has_a_launch_that_registers_hold(tokens):
    for K, V in itertools.product((1, 7, 16, 64, 96, 128, 192, 256), repeat=2):
        config = tuning.heuristic(K, V, tokens)
        check_registers(config, K, min(2, config.tiles(V)))
        assert config.block_v * config.programs * config.tiles(V) >= V


def test_a_launch_that_registers_cannot_hold_is_refused():
    state, step = make(Case("large", (1,), heads=(1, 1, 256, 256)))
    tokens, options = step(0)
    call = options | dict(config=LayerStepConfig(128, 1, 4), implementation="triton")
    with pytest.raises(ValueError, match="at most 128 values of state to a lane"):
        aot.lower(lambda x, y: fused_layer_step(x, *y, **call), state, tokens)
    with pytest.raises(ValueError, match="got LayerStepConfig"):
        LayerStepConfig(2, 4, 1)


def test_start_counts_every_program_of_a_row():
    """An int32, of which each has its share."""
    most = tuning.MAX_HEADS * tuning.MAX_PROGRAMS
    assert most * conv.ADDED < 2**31
    with pytest.raises(ValueError, match="programs must be at most 8"):
        LayerStepConfig(8, 1, 1, 16)
    step = dataclasses.replace(STEP, HV=256)
    assert "HV = 256" in (step.why_not() or "")


@pytest.mark.parametrize("programs", [1, 2, 8, tuning.MAX_HEADS * tuning.MAX_PROGRAMS])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("accepted", [None, 1, 3])
def test_programs_find_where_a_ring_begins_in_any_order(
    programs, keeps, accepted, monkeypatch
):
    """Whoever has moved `start` before. The interpreter's never changes meanwhile."""
    random = np.random.default_rng(programs)
    W, S, began, length, slot = 4, 4, 5, 2, 1
    size = W - 1 + S
    moved = []
    adds = types.SimpleNamespace(atomic_add=lambda ref, at, x: moved.append(int(x)))
    monkeypatch.setattr(conv, "_triton", adds)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # of x, below
    counts = None if accepted is None else jnp.array([accepted], jnp.int32)
    row = Rows(*(jnp.int32(x) for x in (0, 0, length, slot)), True, keeps)
    first = (began + (accepted or 1) - 1) % size if keeps else 0
    left = (first + (length if accepted is None else 1)) % size
    start = began
    for i, program in enumerate(random.permutation(programs)):
        if i < 8 or i >= programs - 8 or program == 0:
            state = ConvState(jnp.zeros((2, 1, size)), jnp.array([7, start], jnp.int32))
            x: Any = types.SimpleNamespace(
                conv=state, tables=types.SimpleNamespace(num_accepted=counts)
            )
            ring = conv.Ring.of(x, row)
            assert (int(ring.first), int(ring.left)) == (first, left)
            ring.move(None, jnp.int32(program), programs)
            start += moved.pop()
        else:
            start += conv.ADDED
        assert abs(start) < 2**31
    assert start == left
