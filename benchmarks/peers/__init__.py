"""Other projects' kernels for Gated DeltaNet and its convolution, laid out to be timed
and compared with ours.

Each peer is a function `peer(problem, inputs) -> Call`. It takes the arrays that our
own kernel takes, brings them into the layout that the peer wants, compiles, and leaves
a `run` that launches the peer's kernel and nothing else. A peer that is not installed,
or that does not do this problem, raises `Unavailable` with the reason.

`inputs` holds JAX arrays on the GPU: state [P, HV, V, K]; q, k [N*T, H, K];
v [N*T, HV, V]; a, b [N*T, HV] (raw logits); A_log, dt_bias [HV]; slots, a list of
tables to take turns with ([N], or [N, T] for verify; every entry a live slot, and none
twice in a table); and for verify num_accepted [N].

Peers of replay, which keep states of their own, are in replay.py.

For prefill and train they hold A_log and dt_bias, cu_seqlens [N+1] or None, and sets to
take turns with: state [N, HV, V, K], q, k, v, a, b as [N, T, ...] (with cu_seqlens as
[N*T, ...]) and for train state_weights and out_weights, the cotangents of what a call
returns.

For the convolution they hold state, a `ConvState` of P slots; weight [C, W];
num_accepted [N] and cu_seqlens [N+1], or None; and sets to take turns with: x as
[N, T, C] (with cu_seqlens as [L, C]) and slots [N].

All peers of the update normalise q and k themselves and scale q by K**-0.5. torch and
the peers are imported when a peer is asked for; where they lie is the caller's
PYTHONPATH: vLLM 0.33 (its Triton files alone will do), fla-core 0.6.0, and FlashInfer
0.6.18's gdn_kernels folder as the package `flashinfer_gdn`, with the CUTLASS DSL that
it needs.
"""

from peers.call import Call as Call
from peers.call import ConvPeer as ConvPeer
from peers.call import Peer
from peers.call import Unavailable as Unavailable
from peers.fla import (
    fla_chunk,
    fla_chunk_forward,
    fla_chunk_given_gates,
    fla_chunk_train,
    fla_fused_recurrent,
)
from peers.fla_conv import fla_conv, fla_conv_update
from peers.flashinfer import flashinfer_decode, flashinfer_mtp
from peers.vllm import (
    vllm_fused_sigmoid_gating,
    vllm_fused_sigmoid_gating_verify,
    vllm_packed_decode,
)
from peers.vllm import vllm_post_conv as vllm_post_conv
from peers.vllm_conv import vllm_conv, vllm_conv_update

DECODE: dict[str, Peer] = {
    "vllm_fused_sigmoid_gating": vllm_fused_sigmoid_gating,
    "vllm_packed_decode": vllm_packed_decode,
    "fla_fused_recurrent": fla_fused_recurrent,
    "flashinfer_decode": flashinfer_decode,
}

VERIFY: dict[str, Peer] = {
    "vllm_fused_sigmoid_gating_verify": vllm_fused_sigmoid_gating_verify,
    "flashinfer_mtp": flashinfer_mtp,
}

PREFILL: dict[str, Peer] = {
    "fla_chunk": fla_chunk,
    "fla_chunk_given_gates": fla_chunk_given_gates,
}

TRAIN: dict[str, Peer] = {
    "fla_chunk_forward": fla_chunk_forward,
    "fla_chunk_train": fla_chunk_train,
}

CONV_DECODE: dict[str, ConvPeer] = {
    "vllm_conv_update": vllm_conv_update,
    "fla_conv_update": fla_conv_update,
}

CONV_VERIFY: dict[str, ConvPeer] = {"vllm_conv_update": vllm_conv_update}

CONV_PREFILL: dict[str, ConvPeer] = {"vllm_conv": vllm_conv, "fla_conv": fla_conv}
