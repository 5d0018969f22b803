"""A layer's step on replay's states in fused kernels, against the ops in turn."""

import dataclasses
import functools
import re

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_steps import KERNELS, poison

from gdn_jax import (
    ConvState,
    LayerStepConfig,
    ReplayConfig,
    ReplayState,
    fused_layer_step,
    testing,
)
from gdn_jax.nn import GatedDeltaNet, arguments
from gdn_jax.ops.layer_step import tuning

pytestmark = pytest.mark.usefixtures("exact_products")

N, P = 4, 7
FRESH, FRESH_AT = 1, 4  # the row and the step where it begins afresh
PARTS = ReplayConfig(block_v=16, block_k=16, steps_v=1, prepare_k=16)


@dataclasses.dataclass(frozen=True)
class Case:
    """`columns` is S; rows have up to as many tokens, of any number where `packed`.
    `says`: whether calls tell how many stand."""

    name: str
    columns: int = 3
    layout: str = "flat"
    heads: tuple[int, int, int, int] = (2, 4, 32, 32)
    window: int = 16
    width: int = 4
    state_dtype: str = "float32"
    act_dtype: str = "float32"
    packed: bool = False
    pair: bool = False
    says: bool = True
    own_slots: bool = False
    null_slot: bool = False
    activation: str = "silu"
    config: ReplayConfig | None = None

    def __str__(self):
        return self.name


CASES = [
    Case("verify"),
    Case("verify, packed, interleaved", 4, "interleaved", packed=True, own_slots=True),
    Case("a token, nobody says", 1, says=False, pair=True, activation="sigmoid"),
    Case("a token, room for more", 3, says=False, layout="interleaved"),
    Case("a long window", 9, window=32, null_slot=True),
    Case("odd sizes", heads=(1, 3, 24, 20), layout="interleaved", own_slots=True),
    Case("blocks of K, parts of V", heads=(1, 2, 48, 40), width=2, config=PARTS),
    Case("bfloat16", 4, state_dtype="bfloat16", act_dtype="bfloat16"),
    Case("float16", 2, state_dtype="float16", act_dtype="float16", packed=True),
]


def make(case, seed=0):
    """(state, a function from a number and the pending counts to that step)."""
    (H, HV, K, V), S = case.heads, case.columns
    C, ring = 2 * H * K + HV * V, case.width - 1 + S
    random = np.random.default_rng(seed)

    def normal(*shape, dtype=case.act_dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    conv_slots = random.permutation(P)[:N].astype(np.int32)
    slots = random.permutation(P)[:N].astype(np.int32) if case.own_slots else conv_slots
    if case.null_slot:  # which others' slots are not
        slots = conv_slots = 1 + random.permutation(P - 1)[:N].astype(np.int32)
    pool = 0.1 * normal(P, HV, V, K, dtype=case.state_dtype)
    made = dict(num_key_heads=H, window=case.window, key_dtype=case.act_dtype)
    recurrent = ReplayState.from_dense(pool, **made)
    buffer = poison(normal(P, C, ring), np.setdiff1d(np.arange(P), conv_slots))
    conv = ConvState(buffer, jnp.asarray(random.integers(0, ring, P), jnp.int32))
    options = dict(
        conv_weight=normal(C, case.width) / 2,
        A_log=jnp.abs(normal(HV, dtype="float32")),
        dt_bias=normal(HV, dtype="float32"),
        norm_weight=1 + normal(V) / 8,
        conv_slots=conv_slots if case.own_slots else None,
    )

    def step(number, pending):
        lengths, lead = None, (N, S if case.says else 1)
        options["slots"] = slots.copy()
        tables = {}
        if case.says:
            most = np.maximum(pending[slots], 1)
            tables["num_accepted"] = random.integers(1, most + 1).astype(np.int32)
        nulls = [number % N] if number % 3 == 2 else []
        if nulls and case.says and number % 2:  # not one of the tokens that there are
            tables["num_accepted"][nulls] = [0, most[nulls[0]] + 1][number % 4 == 1]
        else:
            options["slots"][nulls] = 0 if case.null_slot else -1
        if case.says:
            tables["has_state"] = (np.arange(N) != FRESH) | (number != FRESH_AT)
            if number == FRESH_AT:
                tables["num_accepted"][FRESH] = 1
        if case.packed:
            lengths = random.integers(0, S + 1, N)
            if number == FRESH_AT:
                lengths[FRESH] = 1
            if number == 6:
                lengths[2], nulls = S + 1, [*nulls, 2]
            tables["cu_seqlens"] = np.int32([1, *(1 + np.cumsum(lengths))])
            lead = (1 + N * (S + 1),)
        qkvz, ba = normal(*lead, C + HV * V), normal(*lead, 2 * HV)
        nobody = np.array(nulls, int)
        if case.packed:
            bounds = tables["cu_seqlens"]
            live = [n for n in range(N) if n not in nulls]
            owned = [np.arange(*bounds[n : n + 2]) for n in live]
            nobody = np.setdiff1d(np.arange(lead[0]), np.concatenate(owned))
        qkvz, ba = (x.at[nobody].set(jnp.nan) for x in (qkvz, ba))
        if case.pair:
            qkvz, ba = (qkvz[..., :C], qkvz[..., C:]), (ba[..., :HV], ba[..., HV:])
        return (qkvz, ba), options | tables, nulls, nobody

    return (conv, recurrent), step


@functools.cache
def jitted(implementation, case, config=None):
    def run(state, tokens, options):
        options |= dict(implementation=implementation, config=config)
        options |= dict(layout=case.layout, activation=case.activation)
        options |= dict(null_slot=0) if case.null_slot else {}
        return fused_layer_step(state, *tokens, **options)

    # the ops one after another round what they hand on; a GPU's compiler need not
    options = {"xla_allow_excess_precision": False}
    return jax.jit(run, donate_argnums=0, compiler_options=options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_agree_with_the_ops_one_after_another(case, kernel):
    """Null rows, which leave their slots alone, among others, rings round and round;
    one begins afresh where anything lies. Inputs of the convolution exactly."""
    (got, step), (want, _) = make(case), make(case)
    run = jitted(kernel, case, case.config)
    in_turn = jitted("reference", case)
    folds = 0
    for number in range(22):
        pending = np.array(got[1].pending)
        tokens, options, nulls, nobody = step(number, pending)
        if "has_state" in options and number == FRESH_AT:
            got, want = (spoilt(state, options) for state in (got, want))
        before = jax.tree.map(np.array, got)
        got, out = run(got, tokens, options)
        want, wanted = in_turn(want, tokens, options)
        if number == 0:
            slots, own_slots = slots_of(options)
        live = np.setdiff1d(np.arange(N), nulls)
        used, own = slots[live], own_slots[live]
        for name in ("start", "committed", "pending"):
            assert np.array_equal(getattr(got[1], name), getattr(want[1], name))
        rings = [
            ConvState(conv.buffer[own_slots], conv.start[own_slots]).to_dense(
                case.width
            )
            for conv in (got[0], want[0])
        ]
        assert np.array_equal(*rings)
        error = testing.relative_error(
            got[1].to_dense()[used], want[1].to_dense()[used]
        )
        assert error < 2 * testing.TOLERANCE["chunked state", case.state_dtype]
        error = testing.relative_error(out, wanted)
        assert error < 2 * testing.TOLERANCE["chunked out", case.act_dtype]
        assert not np.array(out)[nobody].any()
        unnamed = (np.setdiff1d(np.arange(P), named) for named in (own, used))
        for old, new, others in zip(before, got, unnamed, strict=True):
            for x, y in zip(old, jax.tree.map(np.array, new), strict=True):
                assert np.array_equal(x[others], y[others], equal_nan=True)
        changed = before[1].checkpoint != np.array(got[1].checkpoint)
        folded = changed.any(axis=(1, 2, 3))
        folded[slots[FRESH]] &= number != FRESH_AT
        folds += folded.sum()
    assert folds


def slots_of(options):
    """Of the rule and of the convolution."""
    slots, own = options["slots"], options["conv_slots"]
    return slots, slots if own is None else own


def spoilt(state, options):
    """With anything in the slot of the row that begins afresh."""
    conv, recurrent = state
    slots, own = slots_of(options)
    conv = conv._replace(buffer=conv.buffer.at[own[FRESH]].set(jnp.nan))
    values = {jnp.dtype("int32"): 77}
    recurrent = jax.tree.map(
        lambda x: x.at[slots[FRESH]].set(values.get(x.dtype, jnp.nan)), recurrent
    )
    return conv, recurrent


def of_decode(case=CASES[2]):
    state, step = make(case)
    tokens, options, *_ = step(0, np.zeros(P, int))
    return state, tokens, options | dict(layout="flat")


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
    assert tuning.find_config("any", step, "bfloat16") == ReplayConfig()


def compiled(T, dtype, layout, packed=False):
    (H, HV, K, V), W, slots, rows = (16, 32, 128, 128), 4, 70, 32
    C = 2 * H * K + HV * V

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    conv = ConvState(array(slots, C, W - 1 + T), array(slots, dtype="int32"))
    zeros = functools.partial(ReplayState.zeros, slots, H, HV, K, V, dtype=dtype)
    state = conv, jax.eval_shape(zeros)
    lead = (rows * T,) if packed else (rows, T)
    heads, each = array(HV, dtype="float32"), array(rows, dtype="int32")
    arrays = dict(conv_weight=array(C, W), A_log=heads, dt_bias=heads)
    arrays |= dict(norm_weight=array(V), slots=each)
    arrays |= dict(num_accepted=each) if T > 1 else {}
    arrays |= dict(cu_seqlens=array(rows + 1, dtype="int32")) if packed else {}
    tokens = array(*lead, C + HV * V), array(*lead, 2 * HV)

    def step(state, tokens, arrays):
        options = dict(layout=layout, implementation="triton")
        return fused_layer_step(state, *tokens, **options, **arrays)

    return state, aot.compile_for_h200(step, state, tokens, arrays, donate_argnums=0)


@pytest.mark.parametrize(
    ("T", "dtype", "layout"),
    [
        (1, "float32", "interleaved"),
        (4, "float32", "flat"),
        (4, "bfloat16", "interleaved"),
        (8, "bfloat16", "flat"),
    ],
)
def test_a_step_is_three_launches_in_place_without_spills(T, dtype, layout):
    state, found = compiled(T, dtype, layout)
    first, second, scaling = found.launches()
    assert aot.KERNEL_CALL in first and aot.KERNEL_CALL in second
    assert aot.KERNEL_CALL not in scaling
    leaves = jax.tree.leaves(state)
    assert not any(aot.copies(found, leaf) for leaf in leaves)
    assert found.alias_bytes == sum(x.size * x.dtype.itemsize for x in leaves)
    assert found.resources()["spills"] == 0


def test_packed_rows_copy_no_states_and_do_not_spill():
    state, found = compiled(4, "float32", "flat", packed=True)
    large = (leaf for leaf in jax.tree.leaves(state) if leaf.size > 10**5)
    assert not any(aot.copies(found, leaf) for leaf in large)
    assert found.resources()["spills"] == 0
