"""Wrong calls of replay and wrong states are told at the door."""

import re

import jax.numpy as jnp
import jaxtyping
import pytest
from replays import dense_call

import gdn_jax
from gdn_jax import ReplayState, replay_update

STATE, TOKENS = dense_call()
LONG = dense_call(T=17)[1]
WRONG = {
    "state.u must be (3, 4, 16, 32), as its": dict(state=STATE._replace(u=STATE.k)),
    "state must be one of (16, 32) records; got a window of 8": dict(
        state=STATE._replace(
            **{
                name: getattr(STATE, name)[:, :, :8]
                for name in ("u", "k", "k_scale", "log_decay")
            }
        )
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
