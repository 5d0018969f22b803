"""The chunked update: values, what it must not touch, wrong calls."""

import functools
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from chunks import KERNELS, PATHS, Case, made, split

import gdn_jax
from gdn_jax import _triton, testing
from gdn_jax.testing.cases import GATES_OPEN


def _call(case, path, donate=True):
    args, kwargs, _ = made(case)
    static, arrays = split(kwargs)

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
    args, _, (want_state, want_out, written) = made(case)
    state, out = _call(case, implementation)
    bar = testing.TOLERANCE["chunked out", out.dtype.name]
    assert testing.relative_error(out, want_out) < bar
    bar = testing.TOLERANCE["chunked state", case.state_dtype]
    assert testing.relative_error(state[written], want_state[written]) < bar
    assert not out[want_out == 0].any()
    untouched = (state[~written], args[0][~written])
    assert np.array_equal(*(x.view(np.uint8) for x in untouched))


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
    args, kwargs, (want_state, want_out, written) = made(case)
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


def test_the_reference_is_the_fused_updates():
    args, kwargs, _ = made(Case("ragged", (3, 0, 2), tokens="packed", null_rows=(2,)))
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
        (
            dict(config=gdn_jax.ChunkConfig(), implementation="xla"),
            "config must be None there; .*implementation='xla'",
        ),
        (
            dict(slots=None, null_slot=0, state=np.zeros((2, 4, 32, 32), np.float32)),
            "null_slot must be given with slots",
        ),
    ],
)
def test_wrong_calls_are_told(more, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    (state, *tokens), kwargs = testing.make(Case("rows", (3,) * 2))
    call = kwargs | dict(state=state) | more
    with pytest.raises(ValueError, match=text):
        gdn_jax.chunk_update(call.pop("state"), *tokens, **call)


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
