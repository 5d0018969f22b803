"""Wrong calls are told in words that name the argument and the remedy."""

import math
import re

import aot
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from good_calls import (
    DENSE,
    DRAFTS,
    HV,
    KDA,
    PACKED,
    POOL,
    ROWS,
    C,
    H,
    K,
    L,
    N,
    P,
    S,
    T,
    V,
    W,
    fused,
    gates,
    ints,
    recurrent,
    zeros,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gdn_jax


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """The tests' type checker would answer a wrong call before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _table(*blocks):
    """Blocks of a good call, then what is said of it for each change that spoils it."""
    return pytest.mark.parametrize(
        ("call", "text"),
        [
            pytest.param(good | change, text, id=text)
            for good, rows in blocks
            for text, change in rows.items()
        ],
    )


def _says(text):
    """The message begins like this; "..." stands for anything."""
    pattern = "^" + re.escape(text).replace(r"\.\.\.", ".*")
    return pytest.raises(ValueError, match=pattern)


STATE = "state must be [P or N, HV, V, K]"
FLOATS = "must be one of float32, bfloat16, float16"
SLOTS = "slots must be [N] with N = 2"


@pytest.mark.parametrize("function", [fused, recurrent])
@_table(
    (
        DENSE,
        {
            f"{STATE}; got (4, 6, 8)": dict(state=zeros(HV, V, K)),
            "q must be [N, T, H, K] ... or [L, H, K] ...; got (2, 8)": dict(
                q=zeros(H, K)
            ),
            "k must be of q's shape (2, 3, 2, 8); got (2, 3, 4, 8)": dict(
                k=zeros(N, T, HV, K)
            ),
            "v must be [2, 3, HV, V], ...; got (2, 4, 4, 6)": dict(
                v=zeros(N, 4, HV, V)
            ),
            "v must be [2, 3, HV, V], ...; got (6, 4, 6)": dict(v=zeros(N * T, HV, V)),
            "v must be ... (HV % H == 0); got 3 value heads over 2 key heads": dict(
                v=zeros(N, T, 3, V)
            ),
            f"{STATE} = [.., 4, 6, 8]; got (7, 4, 8, 6). ...swapaxes": dict(
                state=zeros(P, HV, K, V)
            ),
            f"{STATE} = [.., 4, 6, 8]; got (7, 2, 6, 8)": dict(state=zeros(P, H, V, K)),
            f"{STATE} ...; got (7, 4, 6, 0)": dict(
                state=zeros(P, HV, V, 0), q=zeros(N, T, H, 0), k=zeros(N, T, H, 0)
            ),
            f"{STATE} ...; got (7, 4, 0, 8)": dict(
                state=zeros(P, HV, 0, K), v=zeros(N, T, HV, 0)
            ),
            f"state {FLOATS}; got int32": dict(state=ints(P, HV, V, K)),
            f"q {FLOATS}; got int32": dict(q=ints(N, T, H, K)),
            "q must be an array; got None": dict(q=None),
            f"out_dtype {FLOATS}; got ...int8": dict(out_dtype=jnp.int8),
            f"out_dtype {FLOATS}; got float7": dict(out_dtype="float7"),
            "qk_l2norm must be a Python bool; got int": dict(qk_l2norm=1),
            "slots must be int32; got int64": dict(slots=zeros(N, dtype="int64")),
            "slots must be int32; got float32": dict(slots=zeros(N)),
            "has_state must be bool; got int32": dict(has_state=ints(N)),
            "has_state must be [N] = (2,); got (3,)": dict(has_state=ints(3) > 0),
            f"{SLOTS}; got (3,)": dict(slots=ints(3)),
            f"{SLOTS}; got (2, 3, 1)": dict(slots=ints(N, S, 1)),
            "slots must be [N, S] with N = 2; got (3, 3)": dict(
                slots=ints(3, S), num_accepted=ints(N)
            ),
            "slots must be [N] where num_accepted is None; got (2, 3)": dict(
                slots=ints(N, S)
            ),
            "num_accepted must be given with slots [N, S] ...; got slots (2,)": dict(
                num_accepted=ints(N)
            ),
            "cu_seqlens must be given with packed tokens ...; got dense tokens": dict(
                cu_seqlens=ints(N + 1)
            ),
            "scale must be a finite number > 0 in float32; got 0.0": dict(scale=0.0),
            "scale must be a finite number > 0 in float32; got -1.0": dict(scale=-1.0),
            "scale must be a finite number > 0 in float32; got nan": dict(
                scale=math.nan
            ),
            "null_slot must be an int or None; got 1.5. It is static": dict(
                null_slot=1.5
            ),
            "implementation must be None or one of triton, ...; got 'cuda'": dict(
                implementation="cuda"
            ),
            "config must be a LaunchConfig or None; got {'block_v': 8}": dict(
                config={"block_v": 8}
            ),
            "config must be None there; got ...implementation='xla'. Leave": dict(
                config=gdn_jax.LaunchConfig(8, 4), implementation="xla"
            ),
            "config must be None there; got ...implementation='reference'. Leave": dict(
                config=gdn_jax.LaunchConfig(8, 4), implementation="reference"
            ),
        },
    ),
    (
        ROWS,
        {
            "null_slot must be given with slots, ...; got no slots": dict(null_slot=0),
            "state must be one state per row ...; got 7 states for 2 rows": POOL,
            "num_accepted must be given with slots [N, S] ...; got no slots": dict(
                num_accepted=ints(N)
            ),
        },
    ),
    (
        DRAFTS,
        {
            "slots must be [N, S] with S >= T; got 3 tokens a row for 2 columns": dict(
                slots=ints(N, 2)
            ),
            "slots must be [N, S] with S >= 1; got (2, 0)": dict(slots=ints(N, 0)),
            "num_accepted must be int32; got int64": dict(
                num_accepted=zeros(N, dtype="int64")
            ),
            "num_accepted must be [N] = (2,); got (3,)": dict(num_accepted=ints(3)),
            "num_accepted must be [N] = (2,); got (2, 3)": dict(
                num_accepted=ints(N, S)
            ),
        },
    ),
    (
        PACKED,
        {
            "cu_seqlens must be int32; got int64": dict(
                cu_seqlens=zeros(N + 1, dtype="int64")
            ),
            "cu_seqlens must be [N + 1]; got (1, 3)": dict(cu_seqlens=ints(1, N + 1)),
            "cu_seqlens must be [N + 1]; got (0,)": dict(cu_seqlens=ints(0)),
            f"{SLOTS}; got (5,)": dict(slots=ints(L)),
        },
    ),
)
def test_a_wrong_call_is_told(function, call, text):
    with _says(text):
        function(call)


@pytest.mark.parametrize("function", [fused, gates])
@_table(
    (
        DENSE,
        {
            "A_log must be [HV] = (4,); got (2,)": dict(A_log=zeros(H)),
            f"A_log {FLOATS}; got int32": dict(A_log=ints(HV)),
            "a must be (2, 3, 4), or ... (KDA); got (2, 3, 2)": dict(a=zeros(N, T, H)),
            "dt_bias must be (4,); got (4, 8)": dict(dt_bias=zeros(HV, K)),
            "softplus_beta must be ...number > 0; got 0.0": dict(softplus_beta=0.0),
            "softplus_beta must be ...number > 0; got inf": dict(
                softplus_beta=math.inf
            ),
            "softplus_threshold must be ...; got nan": dict(
                softplus_threshold=math.nan
            ),
            "gate_lower_bound must be ...number < 0; got 0.0": dict(
                gate_lower_bound=0.0
            ),
            "gate_lower_bound must be ...number < 0; got -inf": dict(
                gate_lower_bound=-math.inf
            ),
            "implementation must be None or one of triton, ...; got 'cuda'": dict(
                implementation="cuda"
            ),
        },
    ),
    (KDA, {"dt_bias must be (4, 8); got (4,)": dict(dt_bias=zeros(HV))}),
)
def test_wrong_gates_are_told(function, call, text):
    with _says(text):
        function(call)


@_table(
    (DENSE, {"b must be (2, 3, 4); got (2, 3, 2)": dict(b=zeros(N, T, H))}),
    (
        KDA,
        {
            "a must be ...(2, 3, 4, 8)...; got (2, 3, 4, 6)": dict(
                a=zeros(N, T, HV, V)
            ),
            "b must be (2, 3, 4); got (2, 3, 4, 8)": dict(b=zeros(N, T, HV, K)),
        },
    ),
)
def test_gates_that_miss_the_tokens_are_told(call, text):
    with _says(text):
        fused(call)


@_table(
    (
        DENSE,
        {
            "log_decay must be (2, 3, 4), ...; got (2, 3, 2)": dict(a=zeros(N, T, H)),
            "log_decay must be ...(2, 3, 4, 8)...; got (2, 3, 4, 6)": dict(
                a=zeros(N, T, HV, V)
            ),
            "beta must be (2, 3, 4); got (2, 3, 2)": dict(b=zeros(N, T, H)),
            f"beta {FLOATS}; got int32": dict(b=ints(N, T, HV)),
        },
    )
)
def test_own_gates_that_miss_the_tokens_are_told(call, text):
    with _says(text):
        recurrent(call)


def test_a_logit_without_heads_is_told():
    with _says("b must be [.., HV]; got ()"):
        gates(DENSE | dict(b=zeros()))


def test_float64_is_refused_where_jax_keeps_it():
    with jax.enable_x64(True), _says(f"q {FLOATS}; got float64"):
        fused(DENSE | dict(q=zeros(N, T, H, K, dtype="float64")))


@pytest.mark.parametrize(
    "name", ["scale", "softplus_beta", "softplus_threshold", "gate_lower_bound"]
)
def test_a_traced_option_is_told(name):
    with _says(f"{name} must be a Python number, it is static; got ...Tracer"):
        jax.jit(lambda x: fused(DENSE | {name: x}))(0.5)


@pytest.mark.parametrize("name", ["qk_l2norm", "per_token_states", "allow_neg_eigval"])
def test_a_traced_flag_is_told(name):
    with _says(f"{name} must be a Python bool; got ...Tracer"):
        jax.jit(lambda x: fused(DENSE | {name: x}))(True)


def test_a_traced_null_slot_is_told():
    with _says("null_slot must be an int or None; got ...static: close over it"):
        jax.jit(lambda x: fused(DENSE | dict(null_slot=x)))(0)


def test_slots_may_be_a_list_of_traced_numbers():
    def update(slot):
        return fused(DENSE | dict(slots=[slot, 3]))

    assert jax.jit(update)(jnp.int32(1))[1].shape == (N, T, HV, V)


def test_arrays_over_explicit_mesh_axes_are_told():
    mesh = jax.make_mesh(
        (1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1]
    )
    split = NamedSharding(mesh, PartitionSpec("x"))
    with jax.set_mesh(mesh), _says("q must be whole, or ...; got ...'x'...shard_map"):
        fused(DENSE | dict(q=jax.device_put(jnp.zeros((N, T, H, K)), split)))


CONV = dict(
    state=gdn_jax.ConvState.zeros(P, C, W, jnp.float32),
    x=zeros(N, T, C),
    weight=zeros(C, W),
    slots=ints(N),
)
CONV_PACKED = CONV | dict(x=zeros(L, C), cu_seqlens=ints(N + 1))


@_table(
    (
        CONV,
        {
            "x must be [N, T, C] ... C = 5, ...; got (2, 5, 3). Channels come last": (
                dict(x=zeros(N, C, T))
            ),
            "weight must be [C, W] with C = 5 and W >= 1; got (4, 5)": dict(
                weight=zeros(W, C)
            ),
            "weight must be [C, W] with C = 6 and W >= 1; got (5, 4)": dict(
                x=zeros(N, T, 6)
            ),
            "config must be a ConvConfig or None; got {'tokens': 8}": dict(
                config={"tokens": 8}
            ),
            "config must be a ConvConfig or None; got ChunkConfig": dict(
                config=gdn_jax.ChunkConfig()
            ),
            "config must be None there; got ...implementation='xla'. Leave": dict(
                config=gdn_jax.ConvConfig(8, 8), implementation="xla"
            ),
            "null_slot must be given with slots, ...; got no slots": dict(
                slots=None,
                null_slot=0,
                state=gdn_jax.ConvState.zeros(N, C, W, jnp.float32),
            ),
            "config.tokens must be W - 1 = 3 or more ... 3 tokens; got 2. Take 4": (
                dict(config=gdn_jax.ConvConfig(2, 1))
            ),
        },
    ),
    (
        CONV_PACKED,
        {
            "x must be ... or [L, C] with C = 5...; got (5, 7). Channels come last": (
                dict(x=zeros(C, 7))
            ),
            "config.tokens must be W - 1 = 3 or more ... 5 tokens; got 1. Take 4": (
                dict(config=gdn_jax.ConvConfig(1, 1))
            ),
        },
    ),
)
def test_a_wrong_call_of_the_convolution_is_told(call, text):
    with _says(text):
        gdn_jax.causal_conv1d(**call)


@_table(
    (
        dict(width=W),
        {
            "width must be 1 to 4, ...; got 5": dict(width=5),
            "num_accepted must be [P] = (7,); got (2,)": dict(num_accepted=ints(N)),
            "num_accepted must be [P] = (7,); got ()": dict(num_accepted=1),
            "num_accepted must be int32; got float32": dict(num_accepted=zeros(P)),
        },
    )
)
def test_a_wrong_look_into_the_convolutions_state_is_told(call, text):
    with _says(text):
        CONV["state"].to_dense(**call)


def test_a_launch_that_would_spill_is_told():
    config = gdn_jax.LaunchConfig(block_v=64, lanes_v=4)

    def update(state, q, v, a):
        return gdn_jax.fused_update(
            state, q, q, v, a[0], a, a, a[0], implementation="triton", config=config
        )

    shapes = ((2, HV, 64, 128), (2, H, 128), (2, HV, 64), (2, HV))
    with _says("config must leave at most 128 values ...256 at K=128...more warps"):
        aot.lower(update, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
