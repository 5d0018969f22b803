"""A layer's step in one launch, against the ops it is made of."""

import dataclasses
import functools
import itertools

import aot
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gdn_jax
from gdn_jax import ConvState, LayerStepConfig, fused_layer_step, testing
from gdn_jax.nn import gated_delta_net
from gdn_jax.ops.gated_delta.tuning import check_registers
from gdn_jax.ops.layer_step import tuning
from gdn_jax.ops.layer_step.conv import ADDED

pytestmark = pytest.mark.usefixtures("exact_products")

KERNELS = ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]


@dataclasses.dataclass(frozen=True)
class Case:
    """`lengths`: tokens of each row, dense where they are as many, packed with one
    token before and two behind that nobody owns where they are not. `columns` is S; 1
    is plain decoding."""

    name: str
    lengths: tuple[int, ...] = (1, 1, 1)
    columns: int = 1
    layout: str = "flat"
    heads: tuple[int, int, int, int] = (2, 4, 32, 32)
    width: int = 4
    state_dtype: str = "float32"
    act_dtype: str = "float32"
    nulls: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    pair: bool = False
    activation: str = "silu"
    config: LayerStepConfig | None = None
    state_scale: float = 0.1

    def __str__(self):
        return self.name

    @property
    def verifies(self) -> bool:
        return self.columns > 1

    @property
    def packed(self) -> bool:
        return len(set(self.lengths)) > 1


CASES = [
    Case("decode, flat"),
    Case("decode, interleaved", layout="interleaved", fresh=(1,)),
    Case("decode, two arrays each", pair=True, activation="sigmoid"),
    Case("decode, nulls", (1,) * 5, nulls=(0, 3), fresh=(2,), layout="interleaved"),
    Case("decode, bfloat16", state_dtype="bfloat16", act_dtype="bfloat16"),
    Case("decode, float16", state_dtype="float16", act_dtype="float16"),
    Case("decode, past float16", act_dtype="float16", state_scale=1e7),
    Case(
        "parts of V, past float16",
        act_dtype="float16",
        state_scale=1e7,
        config=LayerStepConfig(8, 2, 2, 2),
    ),
    Case("odd sizes", heads=(1, 3, 24, 20), layout="interleaved", nulls=(1,)),
    Case("a filter of two", width=2, heads=(1, 2, 16, 48)),
    Case("tiles", config=LayerStepConfig(8, 2, 2), fresh=(0,)),
    Case(
        "last tile past the end", heads=(1, 1, 16, 24), config=LayerStepConfig(16, 1, 1)
    ),
    Case("parts of V", config=LayerStepConfig(8, 2, 2, 2), nulls=(1,), fresh=(0,)),
    Case("odd parts", heads=(1, 2, 16, 72), config=LayerStepConfig(16, 1, 1, 2)),
    Case(
        "a tile past the end", heads=(1, 1, 16, 96), config=LayerStepConfig(32, 1, 1, 2)
    ),
    Case("verify, parts, packed", (2, 1, 4), 4, config=LayerStepConfig(8, 2, 2, 4)),
    Case("four value heads a key head", heads=(1, 4, 16, 24), nulls=(1,)),
    Case("rows too long, packed", (1, 2, 1), layout="interleaved", too_long=(1,)),
    Case("verify", (4, 4, 4), 4, fresh=(1,)),
    Case("verify, interleaved", (3, 3), 4, "interleaved", nulls=(1,)),
    Case("verify, packed", (2, 3, 0, 1, 5), 3, fresh=(3,), pair=True, too_long=(4,)),
    Case("verify, tiles, packed", (2, 1, 4), 4, config=LayerStepConfig(16, 2, 2)),
    Case("verify, bfloat16", (4, 4), 4, state_dtype="bfloat16", act_dtype="bfloat16"),
]


def make(case, seed=0):
    """(state, a function from a number to the step of that number)."""
    (H, HV, K, V), N, S = case.heads, len(case.lengths), case.columns
    C, ring, P = 2 * H * K + HV * V, case.width - 1 + S, len(case.lengths) * S + 2
    random = np.random.default_rng(seed)

    def normal(*shape, dtype=case.act_dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    start = jnp.asarray(random.integers(0, ring, P), jnp.int32)
    conv = ConvState(normal(P, C, ring), start)
    state = conv, case.state_scale * normal(P, HV, V, K, dtype=case.state_dtype)
    slots = random.permutation(P)[: N * S].reshape(N, S).astype(np.int32)
    slots[list(case.nulls)] = -1
    unused = np.setdiff1d(np.arange(P), slots)
    state = jax.tree.map(lambda x: _poison(x, unused), state)
    weights = dict(
        conv_weight=normal(C, case.width) / 2,
        A_log=jnp.abs(normal(HV, dtype="float32")),
        dt_bias=normal(HV, dtype="float32"),
        norm_weight=1 + normal(V) / 8,
    )
    options = dict(layout=case.layout, activation=case.activation, **weights)
    lead = (N, case.lengths[0])
    bounds = np.concatenate([[1], 1 + np.cumsum(case.lengths)]).astype(np.int32)
    if case.packed:
        lead = (int(bounds[-1]) + 2,)
        options["cu_seqlens"] = jnp.asarray(bounds)
    options["slots"] = jnp.asarray(slots if case.verifies else slots[:, 0])

    def step(number):
        qkvz, ba = normal(*lead, C + HV * V), normal(*lead, 2 * HV)
        for n in case.nulls:  # dense, in all cases
            qkvz, ba = qkvz.at[n].set(jnp.nan), ba.at[n].set(jnp.nan)
        tables = {}
        if case.verifies:
            most = np.minimum(np.maximum(case.lengths, 1), S)
            tables["num_accepted"] = random.integers(1, most + 1).astype(np.int32)
        if number == 0 and case.fresh:
            has_state = np.ones(N, bool)
            has_state[list(case.fresh)] = False
            tables["has_state"] = jnp.asarray(has_state)
        tokens = qkvz, ba
        if case.pair:
            tokens = (qkvz[..., :C], qkvz[..., C:]), (ba[..., :HV], ba[..., HV:])
        return tokens, options | tables

    return state, step


def _poison(x, slots):
    value = 99 if x.dtype == jnp.int32 else jnp.nan
    return x.at[jnp.asarray(slots, jnp.int32)].set(value)


@functools.cache
def jitted(implementation, layout, activation, config=None):
    def run(state, tokens, options):
        return fused_layer_step(
            state,
            *tokens,
            layout=layout,
            activation=activation,
            implementation=implementation,
            config=config,
            **options,
        )

    # the ops one after another round what they hand on; a GPU's compiler need not
    options = {"xla_allow_excess_precision": False}
    return jax.jit(run, donate_argnums=0, compiler_options=options)


def steps_of(case, implementation, config=None):
    """After each of some steps: the state, out, and the step's tables."""
    state, step = make(case)
    run = jitted(implementation, case.layout, case.activation, config)
    for number in range(5):
        tokens, options = step(number)
        for name in ("layout", "activation"):
            del options[name]
        state, out = run(state, tokens, options)
        yield jax.tree.map(np.array, state), np.array(out), options


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_agree_with_the_ops_one_after_another(case, kernel):
    """Inputs of the convolution exactly; slots of others and of null rows by bits.
    Both may be as far from float64 as the table says, so twice that from each other."""
    before, _ = make(case)
    before = jax.tree.map(np.array, before)
    of_chain = steps_of(case, "reference")
    used = None
    for (got, out, options), (want, out_want, _) in zip(
        steps_of(case, kernel, case.config), of_chain, strict=True
    ):
        slots = np.array(options["slots"])
        slots[list(case.too_long)] = -1
        used = slots[slots >= 0]
        own = slots if slots.ndim == 1 else slots[:, 0]
        own = own[own >= 0]
        accepted = None
        if case.verifies:
            accepted = jnp.ones(len(own), jnp.int32)
        rings = [
            ConvState(*(jnp.asarray(leaf[own]) for leaf in conv)).to_dense(
                case.width, accepted
            )
            for conv in (got[0], want[0])
        ]
        assert np.array_equal(*rings)
        error = testing.relative_error(got[1][used], want[1][used])
        assert error < 2 * testing.TOLERANCE["state", case.state_dtype]
        error = testing.relative_error(out, out_want)
        assert error < 2 * testing.TOLERANCE["out", case.act_dtype]
        dead = np.asarray(case.nulls, int)
        if not case.packed:
            assert not out[dead].any()
        else:
            assert not out[0].any() and not out[-2:].any()
            bounds = np.array(options["cu_seqlens"])
            for row in case.too_long:
                assert not out[bounds[row] : bounds[row + 1]].any()
    others = np.setdiff1d(np.arange(len(before[1])), used)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(got), strict=True):
        assert np.array_equal(old[others], new[others], equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_plain_and_speculative_steps_follow_each_other(kernel):
    """The ring is as wide; a plain step moves `start` past its token."""
    case = Case("both", (4, 4), 4)
    (conv, pool), step = make(case)
    states = {name: (conv, pool) for name in (kernel, "reference")}
    slots = step(0)[1]["slots"]
    for number in range(4):
        tokens, options = step(number)
        if number % 2:
            tokens = tuple(x[:, :1] for x in tokens)
            options |= dict(slots=slots[:, 0])
            del options["num_accepted"]
        elif number:
            options["num_accepted"] = np.ones(2, np.int32)
        for name, state in states.items():
            states[name], _ = fused_layer_step(
                state, *tokens, implementation=name, **options
            )
        got, want = states[kernel], states["reference"]
        own = np.array(slots[:, 0])
        dense = [
            ConvState(*(leaf[own] for leaf in conv)).to_dense(4)
            for conv, _ in (got, want)
        ]
        assert np.array_equal(*dense)
        read = np.array(slots).ravel()
        error = testing.relative_error(got[1][read], want[1][read])
        assert error < testing.TOLERANCE["state", "float32"]


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
        (dict(triple=True), "qkvz must be an array, or with ba a pair of them"),
        (dict(qkvz=(3, 2, 384), ba=(3, 2, 8)), "got T = 2 with room for S = 1 tokens"),
        (dict(slots=(2,)), r"slots must be \[N\] or, .* with N = 3; got \(2,\)"),
        (dict(channels=100), r"state\[0\].buffer must be \[P, C, R\] with C = 2 H K"),
        (dict(pool=(4, 32, 32)), r"state\[1\] must be \[P or N, HV, V, K\]"),
        (dict(state=None), r"state must be \(ConvState, pool\); got NoneType"),
        (dict(pair=True), "qkvz must be an array, or with ba a pair of them"),
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
def test_gradients_are_those_of_the_ops(kernel):
    """Also of states and weights."""
    case = Case("decode", (1, 1))
    (conv, pool), step = make(case)
    slots = step(0)[1]["slots"]
    pool, buffer = (jnp.nan_to_num(x) for x in (pool, conv.buffer))
    tokens, options = step(0)
    static = dict(layout="flat", activation="silu", slots=slots)
    weights = {k: x for k, x in options.items() if k not in static}

    def total(implementation, pool, buffer, tokens, weights):
        state = ConvState(buffer, jnp.zeros(len(buffer), jnp.int32)), pool
        call = weights | static | dict(implementation=implementation)
        (new, after), out = fused_layer_step(state, *tokens, **call)
        history = new.to_dense(case.width)
        return jnp.sum(out**2) + jnp.sum(after**2) + jnp.sum(history**2)

    got, want = (
        jax.jit(jax.grad(functools.partial(total, name), argnums=(0, 1, 2, 3)))(
            pool, buffer, tokens, weights
        )
        for name in (kernel, "reference")
    )
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error = testing.relative_error(leaf, wanted)
        assert error < testing.TOLERANCE["gradient", "float32"]


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

    layer = gated_delta_net.GatedDeltaNet(48, 2, 4, 32, 32, layout=layout)
    N, S = 3, 1 + drafts
    x = jax.random.normal(jax.random.key(0), (N, 5 + 3 * S, 48))
    params = layer.init(jax.random.key(1), x[:, :1])
    monkeypatch.setattr(gated_delta_net, "pays", pays)
    table = jnp.arange(N * S, dtype=jnp.int32)[::-1].reshape(N, S)
    outs, rings = {}, {}
    for name in (kernel, "xla"):
        apply = jax.jit(functools.partial(layer.apply, params, implementation=name))
        if name == "xla":
            monkeypatch.setattr(gated_delta_net, "pays", lambda *_: False)
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


def test_it_runs_where_jax_counts_in_64_bits():
    case = Case("tiles", config=LayerStepConfig(8, 2, 2))
    state, step = make(case)
    tokens, options = step(0)
    call = options | dict(implementation="interpret", config=case.config)
    (_, want), out_want = fused_layer_step(state, *tokens, **call)
    with jax.enable_x64(True):
        (_, got), out = fused_layer_step(state, *tokens, **call)
    used = np.array(options["slots"])
    error = testing.relative_error(got[used], want[used])
    assert error < testing.TOLERANCE["state", "float32"]
    error = testing.relative_error(out, out_want)
    assert error < testing.TOLERANCE["out", "float32"]


def test_calls_under_vmap_are_calls_apart(path):
    state, step = make(Case("plain"))
    tokens, options = step(0)
    options |= dict(implementation=path)

    def run(state, tokens):
        return fused_layer_step(state, *tokens, **options)

    (conv, pool), (ring, size) = state, (len(state[0].start), state[0].buffer.shape[2])
    start = jnp.arange(ring, dtype=jnp.int32) % size
    buffer, pool = (jnp.nan_to_num(x) for x in (conv.buffer, pool))
    state = ConvState(buffer, start), pool
    both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (state, tokens))
    got = jax.vmap(run)(*both)
    used = options["slots"]
    for i in range(2):
        (conv, pool), out = run(*jax.tree.map(lambda x, i=i: x[i], both))
        pairs = [(got[1][i], out), (got[0][1][i, used], pool[used])]
        pairs.append((got[0][0].buffer[i, used], conv.buffer[used]))
        assert np.array_equal(got[0][0].start[i, used], conv.start[used])
        for x, y in pairs:
            assert testing.relative_error(x, y) < testing.TOLERANCE["out", "float32"]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_heads_shard(implementation):
    """`start` is the same on all devices, and is said to be."""
    H, HV, K, V, N = 2, 4, 16, 16, 2
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    sizes = H * K, H * K, HV * V, HV * V
    keys = iter(jax.random.split(jax.random.key(0), 12))
    *qkv, z = (jax.random.normal(next(keys), (N, 1, size)) for size in sizes)
    b, a = (jax.random.normal(next(keys), (N, 1, HV)) for _ in "ba")
    weight = [jax.random.normal(next(keys), (size, 4)) for size in sizes[:3]]
    heads, channels, last = P("heads"), P(None, "heads"), P(None, None, "heads")

    def run(start, buffer, pool, qkv, z, b, a, weight, A_log):
        state = ConvState(jnp.concatenate(buffer, 1), start), pool
        (conv, pool), out = fused_layer_step(
            state,
            (jnp.concatenate(qkv, -1), z),
            (b, a),
            layout="flat",
            conv_weight=jnp.concatenate(weight),
            A_log=A_log,
            dt_bias=A_log,
            norm_weight=jnp.ones(V),
            implementation=implementation,
        )
        return conv.start, pool, out

    buffer = [jnp.ones((N, size, 4)) for size in sizes[:3]]
    start, pool = jnp.zeros(N, jnp.int32), jnp.ones((N, HV, V, K))
    call = start, buffer, pool, qkv, z, b, a, weight, jnp.zeros(HV)
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(), channels, channels, last, last, last, last, heads, heads),
        out_specs=(P(), channels, last),
    )
    for got, want in zip(jax.jit(sharded)(*call), run(*call), strict=True):
        assert testing.relative_error(got, want) < testing.TOLERANCE["out", "float32"]


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


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 9])
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
    assert most * ADDED < 2**31
    with pytest.raises(ValueError, match="programs must be at most 8"):
        LayerStepConfig(8, 1, 1, 16)
    step = dataclasses.replace(STEP, HV=256)
    assert "HV = 256" in (step.why_not() or "")
