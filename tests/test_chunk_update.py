"""The chunked update against the oracles: values, gradients, what it must not touch."""

import functools
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gdn_jax
from gdn_jax import _triton, testing
from gdn_jax.testing.cases import GATES_OPEN

Case = testing.Case
PATHS = ("xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu))
KERNELS = PATHS[1:]
NAMES = ("state", "q", "k", "v", "A_log", "a", "b", "dt_bias")


@functools.cache
def _made(case):
    args, kwargs = testing.make(case, seed=len(case.name))
    return args, kwargs, testing.oracle(args, kwargs)


def _split(kwargs):
    static = {k: v for k, v in kwargs.items() if not isinstance(v, np.ndarray)}
    return static, {k: v for k, v in kwargs.items() if isinstance(v, np.ndarray)}


def _call(case, path, donate=True):
    args, kwargs, _ = _made(case)
    static, arrays = _split(kwargs)

    @functools.partial(jax.jit, donate_argnums=(0,) if donate else ())
    def update(state, rest, arrays):
        return gdn_jax.chunk_update(
            state, *rest, **arrays, **static, implementation=path
        )

    return jax.tree.map(np.asarray, update(jnp.array(args[0]), args[1:], arrays))


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("case", testing.CHUNK_CASES, ids=lambda case: case.name)
def test_agrees_with_the_oracle(case, implementation):
    _agrees_with_the_oracle(case, implementation)


@pytest.mark.parametrize("case", testing.CHUNK_KDA_CASES, ids=lambda case: case.name)
def test_kda_is_xlas(case):
    """Asked for, the kernels say so; not asked for, they are passed over."""
    _agrees_with_the_oracle(case, None)
    with pytest.raises(NotImplementedError, match="KDA"):
        _call(case, "interpret")


def _agrees_with_the_oracle(case, implementation):
    args, _, (want_state, want_out, written) = _made(case)
    state, out = _call(case, implementation)
    bar = testing.TOLERANCE["chunked out", out.dtype.name]
    assert testing.relative_error(out, want_out) < bar
    bar = testing.TOLERANCE["chunked state", case.state_dtype]
    assert testing.relative_error(state[written], want_state[written]) < bar
    assert not out[want_out == 0].any()
    untouched = (state[~written], args[0][~written])
    assert np.array_equal(*(x.view(np.uint8) for x in untouched))


@pytest.mark.parametrize(
    "config", [dict(block_v=8), dict(num_warps=3), dict(num_warps=32, block_v=16)]
)
def test_wrong_configs_are_told(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        gdn_jax.ChunkConfig(**config)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "config",
    [
        gdn_jax.ChunkConfig(64, num_warps=8, num_stages=2, prepare_warps=8),
        gdn_jax.ChunkConfig(16, num_stages=1),
    ],
    ids=str,
)
def test_any_launch_agrees_with_the_oracle(config, kernel):
    case = Case("launch", (70, 0, 3), tokens="packed", H=1, HV=2, V=40, null_rows=(2,))
    args, kwargs, (want_state, want_out, written) = _made(case)
    state, out = gdn_jax.chunk_update(
        *args, **kwargs, implementation=kernel, config=config
    )
    bar = testing.TOLERANCE["chunked out", out.dtype.name]
    assert testing.relative_error(out, want_out) < bar
    bar = testing.TOLERANCE["chunked state", case.state_dtype]
    assert testing.relative_error(np.asarray(state)[written], want_state[written]) < bar


def test_a_gpu_of_little_shared_memory_is_told(monkeypatch):
    client = types.SimpleNamespace(platform_version="cuda")
    device = types.SimpleNamespace(
        platform="gpu", client=client, compute_capability="8.9", device_kind="NVIDIA L4"
    )
    monkeypatch.setattr(_triton, "_device", lambda arrays: device)
    case = Case("L4", (70,))
    with pytest.raises(NotImplementedError, match=r"shared memory.*'NVIDIA L4'.*xla"):
        _call(case, "triton")
    _agrees_with_the_oracle(case, None)


def _is_float32_grade(args, kwargs, implementation):
    want_state, want_out, written = testing.oracle(args, kwargs)
    state, out = gdn_jax.chunk_update(*args, **kwargs, implementation=implementation)
    bar = testing.TOLERANCE["chunked state", "float32"]
    assert testing.relative_error(np.asarray(state)[written], want_state[written]) < bar
    assert testing.relative_error(out, want_out) < bar


@pytest.mark.parametrize("implementation", PATHS)
def test_keys_that_repeat_do_not_blow_up(implementation):
    """Where nothing is forgotten, powers of A grow to 1e17 and cancel."""
    case = Case("same keys", (130,), act_dtype="float32", options=GATES_OPEN)
    (state, q, k, v, A_log, a, b, dt_bias), kwargs = testing.make(case)
    k, b = np.broadcast_to(k[:, :1], k.shape), np.full_like(b, 20.0)  # beta = 1
    _is_float32_grade((state, q, k, v, A_log, a, b, dt_bias), kwargs, implementation)


@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_that_are_alike_stay_apart_with_doubled_beta(kernel):
    """Chunks of float32 add up errors there; keys of two parts added up many more."""
    options = (*GATES_OPEN, ("allow_neg_eigval", True))
    case = Case("alike", (130,), act_dtype="float32", options=options)
    (state, q, k, v, A_log, a, b, dt_bias), kwargs = testing.make(case)
    k, b = k[:, :1] + 0.01 * k, np.full_like(b, 8.0)
    args = state, q, k, v, A_log, a, b, dt_bias
    want, _, written = testing.oracle(args, kwargs)

    def error(path):
        state, _ = gdn_jax.chunk_update(*args, **kwargs, implementation=path)
        return testing.relative_error(np.asarray(state)[written], want[written])

    assert error(kernel) < 4 * error("xla")


@pytest.mark.parametrize("implementation", PATHS)
def test_a_token_may_forget_everything(implementation):
    """A log-decay of -inf is a decay of 0."""
    case = Case("forget", (70,), act_dtype="float32")
    (state, q, k, v, A_log, a, b, dt_bias), kwargs = testing.make(case)
    a = a.copy()
    a[:, 5] = np.inf
    _is_float32_grade((state, q, k, v, A_log, a, b, dt_bias), kwargs, implementation)


@pytest.mark.parametrize("implementation", PATHS)
def test_state_after_a_prefill_is_that_after_decoding(implementation):
    case = Case("prefill", (130,) * 2, slots="none", act_dtype="float32")
    (state, q, k, v, A_log, a, b, dt_bias), _ = testing.make(case)
    want = np.array(state)
    for t in range(130):
        now = (x[:, t : t + 1] for x in (q, k, v))
        now = (*now, A_log, a[:, t : t + 1], b[:, t : t + 1], dt_bias)
        want, _ = gdn_jax.fused_update(want, *now, implementation="xla")
    got, _ = gdn_jax.chunk_update(
        state, q, k, v, A_log, a, b, dt_bias, implementation=implementation
    )
    bar = testing.TOLERANCE["chunked state", "float32"]
    assert testing.relative_error(got, want) < bar


GRADIENTS = (
    Case(
        "two tiles of K, of V",
        (70, 0, 9),
        tokens="packed",
        H=1,
        HV=3,
        K=72,
        V=100,
        act_dtype="float32",
    ),
    Case("float32", (100,) * 2, slots="none", act_dtype="float32", fresh=(1,)),
    Case("bfloat16", (100,) * 2, null_rows=(1,)),
    Case("float16", (70,), act_dtype="float16", H=1, HV=2, K=16),
    Case(
        "ragged, doubled beta",
        (70, 0, 65, 1, 33),
        tokens="packed",
        null_rows=(4,),
        padding=3,
        act_dtype="float32",
        options=(("allow_neg_eigval", True),),
    ),
    Case("plain q, k", (70,), options=(("qk_l2norm", False),), K=16, gate_spread=0.1),
    Case("extreme gates", (130,), gate_spread=40.0, act_dtype="float32"),
)


def _pull_back(case, function, path, dtype=None):
    args, kwargs, (states, out, _) = _made(case)
    static, arrays = _split(kwargs)
    args = [x if dtype is None else x.astype(dtype) for x in args]

    def call(*args):
        state, out = function(*args, **arrays, **static, implementation=path)
        return state.astype(jnp.float32), out.astype(jnp.float32)

    random = np.random.default_rng(1)
    cotangents = [
        jnp.asarray(random.standard_normal(x.shape), case.act_dtype)  # as they arrive
        for x in (states, out)
    ]
    cotangents = [x.astype(jnp.float32) for x in cotangents]

    @jax.jit
    def pulled(args, cotangents):
        return jax.vjp(call, *args)[1](tuple(cotangents))

    return pulled(args, cotangents)


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_gradients_are_the_oracles(case, implementation):
    _gradients_are_the_oracles(case, implementation)


@pytest.mark.parametrize(
    "case",
    [
        Case("KDA", (70,) * 2, kda=True, act_dtype="float32"),
        Case(
            "KDA, ragged nulls",
            (66, 2, 0, 65, 3),
            tokens="packed",
            kda=True,
            H=4,
            K=8,
            V=8,
            null_rows=(1,),
            fresh=(3,),
            padding=2,
            act_dtype="float32",
        ),
    ],
    ids=lambda case: case.name,
)
def test_gradients_of_kda(case):
    _gradients_are_the_oracles(case, "xla")


@functools.cache
def _wanted(case):
    return _pull_back(case, gdn_jax.fused_update, "reference", np.float32)


def _gradients_are_the_oracles(case, implementation):
    got = _pull_back(case, gdn_jax.chunk_update, implementation)
    for name, g, w in zip(NAMES, got, _wanted(case), strict=True):
        assert np.isfinite(np.asarray(g, np.float32)).all(), name
        bar = testing.TOLERANCE["gradient", g.dtype.name]
        assert testing.relative_error(g, w) < bar, name


@pytest.mark.parametrize("implementation", PATHS)
def test_gradients_of_null_rows_are_zero(implementation):
    case = Case("nulls", (70,) * 2, null_rows=(0,))
    args, _, _ = _made(case)
    for name, g in zip(
        NAMES, _pull_back(case, gdn_jax.chunk_update, implementation), strict=True
    ):
        if name in ("q", "k", "v", "a", "b"):
            assert np.isnan(np.asarray(args[NAMES.index(name)][0], np.float32)).any()
            assert not np.asarray(g[0], np.float32).any(), name


@functools.cache
def _two_layers():
    """Inputs of a call, and the oracle's gradients of the sums of two in a row."""
    case = Case("rows", (65,) * 2, slots="none", act_dtype="float32", K=16, V=16)
    args, _ = testing.make(case)

    def loss(state, *rest):
        def layer(state, _):
            new, out = gdn_jax.fused_update(state, *rest, implementation="reference")
            return new, out.sum()

        state, sums = jax.lax.scan(layer, state, None, length=2)
        return sums.sum() + state.sum()

    return args, jax.jit(jax.grad(loss, argnums=range(8)))(*args)


@pytest.mark.parametrize("implementation", PATHS)
def test_it_works_under_checkpoint_vmap_and_scan(implementation):
    args, want = _two_layers()

    def loss(state, *rest):
        def layer(state, _):
            new, out = gdn_jax.chunk_update(state, *rest, implementation=implementation)
            return new, out.sum()

        state, sums = jax.lax.scan(jax.checkpoint(layer), state, None, length=2)
        return sums.sum() + state.sum()

    batch = [jnp.stack([jnp.zeros_like(x), x]) for x in args]
    got = jax.jit(jax.vmap(jax.grad(loss, argnums=range(8))))(*batch)
    bar = testing.TOLERANCE["gradient", "float32"]
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert testing.relative_error(g[1], w) < bar, name


def test_the_reference_is_the_fused_updates():
    args, kwargs, _ = _made(Case("ragged", (3, 0, 2), tokens="packed", null_rows=(2,)))
    fused, chunked = (
        function(*args, **kwargs, implementation="reference")
        for function in (gdn_jax.fused_update, gdn_jax.chunk_update)
    )
    for got, want in zip(chunked, fused, strict=True):
        assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            dict(slots=np.zeros((2, 3), np.int32)),
            r"slots must be \[N\], one slot a row",
        ),
        (dict(implementation="cuda"), "implementation must be None or one of"),
        (dict(scale=0.0), "scale must be"),
        (dict(config={"block_v": 32}), "config must be a ChunkConfig or None"),
    ],
)
def test_wrong_calls_are_told(more, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    args, kwargs = testing.make(Case("rows", (3,) * 2))
    with pytest.raises(ValueError, match=text):
        gdn_jax.chunk_update(*args, **kwargs | more)


def test_arguments_of_the_fused_update_alone_are_refused():
    args, kwargs = testing.make(Case("rows", (3,) * 2))
    for name in ("per_token_states", "num_accepted"):
        with pytest.raises(TypeError, match=name):
            gdn_jax.chunk_update(*args, **kwargs, **{name: None})


def test_empty_calls_return_the_state():
    args, _ = testing.make(Case("rows", (3,) * 2, slots="none"))
    state, *tokens = args
    none = [x[:, :0] if x.ndim > 2 else x for x in tokens]
    new, out = gdn_jax.chunk_update(state, *none)
    assert np.array_equal(new, state)
    assert out.shape == (2, 0, 4, 32)
