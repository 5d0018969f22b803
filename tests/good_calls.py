"""Good calls of the rule's ops, by name, and what makes them."""

import numpy as np

import gdn_jax

N, T, L, P, S, H, HV, K, V, C, W = 2, 3, 5, 7, 3, 2, 4, 8, 6, 5, 4
LOGITS = ("A_log", "a", "b", "dt_bias")


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def ints(*shape):
    return np.zeros(shape, np.int32)


def tokens(*axes):
    return dict(
        q=zeros(*axes, H, K),
        k=zeros(*axes, H, K),
        v=zeros(*axes, HV, V),
        A_log=zeros(HV),
        a=zeros(*axes, HV),
        b=zeros(*axes, HV),
        dt_bias=zeros(HV),
    )


POOL = dict(state=zeros(P, HV, V, K))
ROWS = dict(state=zeros(N, HV, V, K)) | tokens(N, T)
DENSE = POOL | tokens(N, T) | dict(slots=ints(N))
DRAFTS = DENSE | dict(slots=ints(N, S), num_accepted=ints(N))
PACKED = POOL | tokens(L) | dict(slots=ints(N), cu_seqlens=ints(N + 1))
KDA = DENSE | dict(a=zeros(N, T, HV, K), dt_bias=zeros(HV, K))


def fused(call):
    return gdn_jax.fused_update(**call)


def recurrent(call):
    """The same call for a caller with gates of its own."""
    rest = {name: x for name, x in call.items() if name not in LOGITS}
    return gdn_jax.recurrent_update(**rest, log_decay=call["a"], beta=call["b"])


def gates(call):
    """The part of the call that makes the gates."""
    others = ("state", "q", "k", "v", "slots")
    return gdn_jax.gates(**{name: x for name, x in call.items() if name not in others})
