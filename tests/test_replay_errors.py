"""Wrong calls of replay and wrong states are told at the door."""

import re

import jax.numpy as jnp
import jaxtyping
import pytest

import gdn_jax
from gdn_jax import ReplayState, replay_update
from gdn_jax.testing.replays import dense_call

STATE, TOKENS = dense_call()
LONG = dense_call(T=17)[1]
WRONG = {
    "state.u must be (3, 4, 16, 32), as its": dict(state=STATE._replace(u=STATE.k)),
    "state.k must be one of (16, 32) records; got 8 records": dict(
        state=STATE._replace(
            **{
                name: getattr(STATE, name)[:, :, :8]
                for name in ("u", "k", "k_scale", "log_decay")
            }
        )
    ),
    "k must be of a dtype that bfloat16 holds; got float16": dict(
        zip("qkv", dense_call(act_dtype="float16")[1], strict=False)
    ),
    "with chunk_update into its checkpoint": dict(
        zip("qkv", LONG, strict=False), a=LONG[4], b=LONG[5]
    ),
    "state.pending must be int32; got float32": dict(
        state=STATE._replace(pending=jnp.zeros(3))
    ),
    "q must be of at most R = 16 tokens; got 17 tokens a row": dict(
        zip("qkv", LONG, strict=False), a=LONG[4], b=LONG[5]
    ),
    "state.k_scale must be float32; got bfloat16": dict(
        state=STATE._replace(k_scale=STATE.k_scale.astype(jnp.bfloat16))
    ),
    "slots must be [N] with N = 3; got (2,)": dict(slots=jnp.zeros(2, jnp.int32)),
    "slots must be [N], one slot a row; got (3, 2)": dict(
        slots=jnp.zeros((3, 2), jnp.int32)
    ),
    "num_accepted must be [N] = (3,); got (2,)": dict(
        num_accepted=jnp.zeros(2, jnp.int32)
    ),
    "k must be of a dtype that bfloat16 holds; got float32": dict(
        k=TOKENS[1].astype(jnp.float32)
    ),
    "k must be of H = 2; got 1 key heads": dict(
        q=TOKENS[0][:, :, :1], k=TOKENS[1][:, :, :1]
    ),
    "a must be what the records of state.log_decay have; got a decay for each K": dict(
        a=jnp.zeros((3, 4, 4, 32)), dt_bias=jnp.zeros((4, 32))
    ),
    "implementation must be None or one of": dict(implementation="cuda"),
}
NAMES = "state", "q", "k", "v", "A_log", "a", "b", "dt_bias"


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_call_is_told(text):
    call = dict(zip(NAMES, (STATE, *TOKENS), strict=True)) | WRONG[text]
    with pytest.raises(ValueError, match=re.escape(text)):
        replay_update(**call)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(state=STATE.checkpoint), "ReplayState"),
        (dict(config=gdn_jax.LaunchConfig(8, 1)), "ReplayConfig"),
    ],
)
def test_a_wrong_type_is_told(change, name):
    call = dict(zip(NAMES, (STATE, *TOKENS), strict=True)) | change
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=name):
        replay_update(**call)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(window=8), r"window must be one of \(16, 32\); got 8"),
        (dict(num_key_heads=3), "num_key_heads must be a divisor of HV=4"),
        (dict(key_dtype=jnp.int8), "key_dtype must be one of float32"),
        (dict(state=jnp.zeros((3, 4))), r"state must be \[P, HV, V, K\]"),
    ],
)
def test_a_wrong_state_is_told(change, text):
    given = dict(state=STATE.checkpoint, num_key_heads=2) | change
    with pytest.raises(ValueError, match=text):
        ReplayState.from_dense(**given)


@pytest.mark.parametrize("op", ["fused_update", "chunk_update"])
def test_an_op_that_is_not_replays_names_what_is(op, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"It is for replay_update.*to_dense\(\)"):
        getattr(gdn_jax, op)(STATE, *TOKENS)
    with pytest.raises(ValueError, match="state must be an array; got ReplayState"):
        ReplayState.from_dense(STATE, num_key_heads=1)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((-1, 1, 2, 4, 4), "num_slots must be"),
        ((2, 1, 2.5, 4, 4), "num_value_heads must be"),
    ],
)
def test_wrong_sizes_are_told(sizes, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=text):
        ReplayState.zeros(*sizes)
    with pytest.raises(ValueError, match="window must be one of"):
        ReplayState.zeros(2, 1, 2, 4, 4, window=16.0)
    with pytest.raises(ValueError, match=r"slots must be \[N\]; got \(\)"):
        STATE.reset(jnp.int32(1))


def test_the_kernel_has_registers_for_heads_of_256():
    state, tokens = dense_call(1, 1, H=1, HV=1, K=257, V=2)
    with pytest.raises(NotImplementedError, match="K and V up to 256; got K=257"):
        replay_update(state, *tokens, implementation="interpret")
    replay_update(state, *tokens)
