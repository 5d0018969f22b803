"""Ops that devices share out: as on one, whatever the mesh."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from meshes import mesh_of

import gdn_jax
from gdn_jax import ConvState, ReplayState, sharding, testing
from gdn_jax.ops.cached_attention.api import cached_attention
from gdn_jax.ops.cached_attention.call import Inputs

pytestmark = pytest.mark.usefixtures("exact_products")

TOLERANCE = 1e-5
H, HV, K, V, W = 4, 8, 8, 6, 4
N, T, P = 4, 3, 8
SLOTS = np.array([1, 0, 7, 4], np.int32)  # of each half of the pool two


@functools.cache
def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(*lead, heads=H, per_k=False):
    q, k = normal(1, *lead, heads, K), normal(2, *lead, heads, K)
    a = normal(4, *lead, HV, K) if per_k else normal(4, *lead, HV)
    dt_bias = normal(7, HV, K) if per_k else normal(7, HV)
    v, b = normal(3, *lead, HV, V), normal(5, *lead, HV)
    return q, k, v, normal(6, HV), a, b, dt_bias


def pool(slots=P):
    return normal(8, slots, HV, V, K)


def conv_case(**keywords):
    C = 2 * H * K + HV * V
    state = ConvState(normal(1, P, C, W + 1), jnp.arange(P, dtype=jnp.int32) % 3)
    return (state, normal(2, N, T, C), normal(3, C, W)), keywords


def step_case(layout):
    C, ends = 2 * H * K + HV * V, HV * V
    state = ConvState(normal(1, P, C, W), jnp.zeros(P, jnp.int32)), pool()
    if layout == "flat":
        qkvz = normal(2, N, 1, C), normal(3, N, 1, ends)
        ba = normal(4, N, 1, HV), normal(5, N, 1, HV)
    else:
        qkvz, ba = normal(2, N, 1, C + ends), normal(4, N, 1, 2 * HV)
    weights = dict(
        conv_weight=normal(6, C, W),
        A_log=normal(7, HV),
        dt_bias=normal(8, HV),
        norm_weight=normal(9, V),
    )
    return (state, qkvz, ba), dict(layout=layout, slots=SLOTS) | weights


def replay_case(key_heads):
    state = ReplayState.from_dense(
        pool(), num_key_heads=key_heads, key_dtype=jnp.float32
    )
    return (state, *tokens(N, T)), dict(slots=SLOTS)


CASES = {
    "dense": ("fused_update", ((pool(N), *tokens(N, T)), {})),
    "pool": ("fused_update", ((pool(), *tokens(N, T)), dict(slots=SLOTS))),
    "null slot": (
        "fused_update",
        ((pool(), *tokens(N)), dict(slots=SLOTS, null_slot=0)),
    ),
    "KDA": ("fused_update", ((pool(N), *tokens(N, T, per_k=True)), {})),
    "drafts": (
        "fused_update",
        (
            (pool(), *tokens(N, 2)),
            dict(
                slots=np.array([[0, 1], [2, 3], [5, 4], [6, 7]], np.int32),
                num_accepted=np.array([1, 2, 2, 1], np.int32),
                has_state=np.array([True, True, False, True]),
            ),
        ),
    ),
    "states of tokens": (
        "fused_update",
        ((pool(N), *tokens(N, T)), dict(per_token_states=True)),
    ),
    "gates apart": (
        "recurrent_update",
        (
            (
                pool(N),
                *tokens(N, T)[:3],
                -jnp.abs(normal(4, N, T, HV)),
                normal(5, N, T, HV),
            ),
            {},
        ),
    ),
    "chunks": ("chunk_update", ((pool(), *tokens(N, 70)), dict(slots=SLOTS))),
    "replay": ("replay_update", replay_case(H)),
    "gates": ("gates", (tokens(N, T)[3:], {})),
    "norm": (
        "gated_rms_norm",
        ((normal(1, N, T, HV, V), normal(2, N, T, HV, V), normal(3, V)), {}),
    ),
    "convolution": ("causal_conv1d", conv_case(slots=SLOTS)),
    "attention": (
        "cached_attention",
        (
            (
                Inputs(
                    normal(1, N, T, HV, 8),
                    normal(2, P, H, 10, 8),
                    normal(3, P, H, 10, 8),
                    jnp.asarray(SLOTS),
                    jnp.array([0, 3, 7, 2], jnp.int32),
                ),
            ),
            {},
        ),
    ),
    "copies": (
        "copy_slots",
        (
            ((ConvState(normal(1, P, 16, W), jnp.arange(P)), pool()),),
            dict(src=np.array([1, 5], np.int32), dst=np.array([3, 6], np.int32)),
        ),
    ),
}
OF_TWO = ("dense", "KDA", "drafts")  # with more devices than key heads


def run(op, args, keywords):
    return jax.jit(functools.partial(op, **keywords))(*args)


def op_of(name):
    return cached_attention if name == "cached_attention" else getattr(gdn_jax, name)


def assert_same(got, want):
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for x, y in leaves:
        assert testing.relative_error(np.asarray(x), np.asarray(y)) < TOLERANCE


@functools.cache
def wanted(case):
    name, (args, keywords) = CASES[case]
    return run(op_of(name), args, keywords)


@pytest.mark.parametrize(
    ("case", "mesh"),
    [(case, (2, 4)) for case in CASES] + [(case, (1, 8)) for case in OF_TWO],
)
def test_as_on_one_device(case, mesh):
    name, (args, keywords) = CASES[case]
    shared = sharding.split(op_of(name), mesh_of(*mesh))
    assert_same(run(shared, args, keywords), wanted(case))


def test_a_kernel():
    name, (args, keywords) = CASES["pool"]
    shared = sharding.split(op_of(name), mesh_of(2, 4))
    got = run(shared, args, keywords | dict(implementation="interpret"))
    assert_same(got, wanted("pool"))


def test_nothing_is_sent():
    """Around the rule, of arrays that lie where they belong."""
    mesh = mesh_of(2, 4)
    shared = jax.jit(sharding.split(gdn_jax.fused_update, mesh), donate_argnums=0)
    grid = sharding.grid.Grid(mesh)
    names = [("rows", "gdn_value_heads"), *[("rows", None, "gdn_value_heads")] * 3]
    names += [("gdn_value_heads",), *[("rows", None, "gdn_value_heads")] * 2]
    names += [("gdn_value_heads",)]
    args = [
        jax.device_put(x.copy(), jax.sharding.NamedSharding(mesh, grid.spec(axes)))
        for x, axes in zip((pool(N), *tokens(N, T)), names, strict=True)
    ]
    text = shared.lower(*args).compile().as_text()
    assert testing.collectives(text) == {}
    state, _ = shared(*args)
    assert {x.data.shape for x in state.addressable_shards} == {(2, 2, V, K)}


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (1, 1)])
def test_devices_round_by_bits_of_their_own(mesh):
    """Of two devices' values, alike before they are rounded, and the same each time."""
    one = [jnp.broadcast_to(normal(i, K), (2, HV, K)) for i in (1, 2)]
    heads, gates = jnp.zeros(HV), jnp.zeros((2, HV))
    alike = *one, jnp.ones((2, HV, V)), heads, gates, gates, heads
    state = jnp.broadcast_to(normal(8, V, K), (2, HV, V, K)).astype(jnp.bfloat16)
    key = dict(state_rounding="stochastic", rounding_key=jax.random.key(5))
    op = sharding.split(gdn_jax.fused_update, mesh_of(*mesh))
    nearest = np.asarray(run(op, (state, *alike), {})[0], np.float32)
    assert np.ptp(nearest, axis=(0, 1)).max() == 0
    got, again = (np.asarray(run(op, (state, *alike), key)[0]) for _ in range(2))
    np.testing.assert_array_equal(got, again)
    first, second = (got[0], got[1]) if mesh[0] == 2 else (got[:, :4], got[:, 4:])
    assert (first != second).any()
    one = np.asarray(run(gdn_jax.fused_update, (state, *alike), key)[0])
    assert (got == one).all() == (mesh == (1, 1))


def test_replay_with_a_key_head_for_each_device():
    args, keywords = replay_case(8)
    shared = sharding.split(gdn_jax.replay_update, mesh_of(1, 8))
    for _ in range(2):
        state, out = run(shared, args, keywords)
        args = state, *args[1:]
    want, tokens = wanted("replay")[0], CASES["replay"][1][0][1:]
    want, want_out = run(gdn_jax.replay_update, (want, *tokens), keywords)
    assert_same(out, want_out)
    assert_same(state.to_dense(), want.to_dense())


def test_packed_rows_by_parts():
    args, parts = (pool(), *tokens(12)), np.array([[0, 4, 6], [0, 1, 6]], np.int32)
    shared = sharding.split(gdn_jax.fused_update, mesh_of(2, 4))
    got = run(shared, args, dict(slots=SLOTS, cu_seqlens=parts))
    whole = dict(slots=SLOTS, cu_seqlens=np.array([0, 4, 6, 7, 12], np.int32))
    assert_same(got, run(gdn_jax.fused_update, args, whole))


def test_channels_by_parts():
    """q, k and v of a convolution come back as they are without a mesh."""
    sizes, parts = (H * K, H * K, HV * V), 4
    (state, x, weight), keywords = conv_case(slots=SLOTS, split=sizes)
    keywords |= dict(num_accepted=np.array([1, 2, 1, 2], np.int32))
    x = x[:, :2]
    want_state, want = run(gdn_jax.causal_conv1d, (state, x, weight), keywords)

    def order(y, axis):
        return sharding.by_parts(y, sizes, parts, axis=axis)

    shared = sharding.split(gdn_jax.causal_conv1d, mesh_of(2, parts))
    ordered = state._replace(buffer=order(state.buffer, 1))
    args = ordered, order(x, -1), order(weight, 0)
    got_state, got = run(shared, args, keywords)
    assert_same(got, want)
    assert_same(got_state.buffer, order(want_state.buffer, 1))


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("layout", ["flat", "interleaved"])
def test_a_step_by_parts(layout, replay):
    sizes, parts = (H * K, H * K, HV * V), 4
    (state, qkvz, ba), keywords = step_case(layout)
    if replay:
        state = state[0], replay_case(H)[0][0]
    want_state, want = run(gdn_jax.fused_layer_step, (state, qkvz, ba), keywords)

    def order(y, axis=-1):
        return sharding.by_parts(y, sizes, parts, axis=axis)

    conv = state[0]._replace(buffer=order(state[0].buffer, 1))
    keywords |= dict(conv_weight=order(keywords["conv_weight"], 0))
    shared = sharding.split(gdn_jax.fused_layer_step, mesh_of(2, parts))
    if layout == "flat":
        qkvz = order(qkvz[0]), qkvz[1]
    got_state, got = run(shared, ((conv, state[1]), qkvz, ba), keywords)
    assert_same((got_state[1], got), (want_state[1], want))


def test_experts():
    """Rows of two groups of devices, each with sizes of its own."""
    x, weights = normal(1, 24, 6), normal(2, 8, 6, 5)
    sizes = np.array([[3, 0, 1, 2, 0, 0, 4, 1], [0, 0, 0, 0, 5, 5, 0, 0]], np.int32)
    shared = sharding.split(gdn_jax.grouped_dot, mesh_of(2, 4))
    got = run(shared, (x, weights, sizes), {})
    each = [
        gdn_jax.grouped_dot(rows, weights, jnp.asarray(own))
        for rows, own in zip(jnp.split(x, 2), sizes, strict=True)
    ]
    assert_same(got, jnp.concatenate(each))


def test_gradients():
    args = pool(N), *tokens(N, T)

    def loss(op, *args):
        state, out = op(*args)
        return jnp.sum(state**2) + jnp.sum(jnp.sin(out))

    numbers = tuple(range(len(args)))
    shared = sharding.split(gdn_jax.fused_update, mesh_of(2, 4))
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, op), numbers))(*args)
        for op in (shared, gdn_jax.fused_update)
    )
    assert_same(got, want)


def says(text):
    return pytest.raises(ValueError, match=text)


def test_wrong_calls():
    args = pool(N), *tokens(N, T)
    with says("state's axis 1.*multiple of the 3 devices.*got 8.*'model': 1, 2, 4, 8"):
        sharding.split(gdn_jax.fused_update, mesh_of(1, 3))(*args)
    with says("state's axis 0 .rows.*3 devices.*'data'; got 4.*1, 2, 4"):
        sharding.split(gdn_jax.fused_update, mesh_of(3, 1))(*args)
    with says("q's axis 2.*or a divisor of them where they divide 8, its readers"):
        few = (pool(N), *tokens(N, T, heads=2)[:2], *args[3:])
        axes = sharding.AXES | dict(gdn_value_heads=None)
        sharding.split(gdn_jax.fused_update, mesh_of(1, 3), axes=axes)(*few)
    with says("cu_seqlens must be .2, ...*each part's own"):
        packed = pool(N), *tokens(12)
        table = dict(cu_seqlens=np.array([0, 3, 6, 9, 12], np.int32))
        sharding.split(gdn_jax.fused_update, mesh_of(2, 1))(*packed, **table)
    with says("cu_seqlens must be .2, ...*each part's own; got .4, 3"):
        table = dict(cu_seqlens=np.tile(np.array([0, 3, 6], np.int32), (4, 1)))
        sharding.split(gdn_jax.fused_update, mesh_of(2, 1))(*packed, **table)
    with says("op must be one of fused_update.*shard_map yourself"):
        sharding.split(jnp.dot, mesh_of(1, 1))
    with says("state must be an array; got ReplayState.*replay_update"):
        replay, _ = replay_case(H)
        untyped = inspect.unwrap(gdn_jax.fused_update)  # as without the suite's hook
        sharding.split(untyped, mesh_of(1, 2))(*replay)
    with says("key heads of conv.*the 8 devices.*'model'; got 4.*'model': 1, 2, 4"):
        step, keywords = step_case("flat")
        sharding.split(gdn_jax.fused_layer_step, mesh_of(1, 8))(*step, **keywords)
    many = jax.device_count() + 1
    with says(f"at most {many - 1} devices"):
        sharding.make_mesh(1, many)


def test_an_error_offers_what_all_axes_allow():
    """Two devices could share six value heads, and not the three key heads beside."""
    q, k, v, A_log, a, b, dt_bias = tokens(N, T)
    three = *(x[:, :, :3] for x in (q, k)), v[:, :, :6]
    three += (*(x[..., :6] for x in (A_log, a, b, dt_bias)),)
    with says("state's axis 1.*got 6.*Possible sizes of 'model': 1, 3, 6.$"):
        sharding.split(gdn_jax.fused_update, mesh_of(1, 4))(pool(N)[:, :6], *three)
    with says("state's axis 0.*got 9.*next multiple is 10.*sizes of 'data': 1.$"):
        shared = sharding.split(gdn_jax.fused_update, mesh_of(2, 1))
        shared(pool(9), *tokens(N), slots=SLOTS)


@pytest.mark.parametrize("columns", [(), (1,)], ids=["slots", "columns"])
def test_slots_of_another_part(columns):
    """Are an error where the host knows of them, and null where it does not."""
    update = sharding.split(gdn_jax.fused_update, mesh_of(2, 1))
    slots = np.array([0, 5, 4, 7], np.int32).reshape(4, *columns)
    more = dict(num_accepted=np.ones(4, np.int32)) if columns else {}
    with says("slots must be .*own part.*|slots must be .*of 4 slots each; got .*1: "):
        update(pool(), *tokens(4), slots=slots, **more)
    slots[1] = -1
    update(pool(), *tokens(4), slots=slots, **more)
    slots[1] = 5
    _, out = jax.jit(update)(pool(), *tokens(4), slots=jnp.asarray(slots), **more)
    assert not np.any(out[1]) and np.all(np.any(out[2], axis=-1))


def test_copies_between_parts():
    """Are an error where the host knows of them, and no copies where it does not."""
    copy = sharding.split(gdn_jax.copy_slots, mesh_of(2, 1))
    with says("src and dst must be of one part.*of 4 slots.*got .0, 4.; .7, 2.*free"):
        copy(pool(), [0, 1, 7, 8], np.array([4, 2, 2, 0]))
    copy(pool(), [9, -1], [0, 5])  # pairs of none
    got = jax.jit(copy)(pool(), jnp.array([0, 1]), jnp.array([4, 2]))
    np.testing.assert_array_equal(got, pool().at[2].set(pool()[1]))


def test_wrong_meshes():
    mesh_of(1, 2)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    with says("mesh must be one with 'data', 'model'.*axes=dict"):
        sharding.split(gdn_jax.gates, mesh)
    with says("axes must be other axes of the mesh for rows than for .*'model'"):
        axes = dict(sharding.AXES, rows="model")
        sharding.split(gdn_jax.gates, mesh_of(1, 2), axes=axes)
    with says("of axis type Auto"):
        mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
        sharding.split(gdn_jax.gates, mesh)
