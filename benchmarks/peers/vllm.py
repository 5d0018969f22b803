"""vLLM 0.33's kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax

from peers.call import Call, Inputs, Problem, load, require
from peers.tensors import Tensors, copy, named, to_numpy, view, warm_up

if TYPE_CHECKING:
    from torch import Tensor


def vllm_fused_sigmoid_gating(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33, the kernel this project ports, on one token a row."""
    require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    return _fused_sigmoid_gating(problem, inputs, num_accepted=None)


def vllm_fused_sigmoid_gating_verify(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33, the same kernel verifying drafts: a state is written after each token.

    Row n starts from slot slots[n, num_accepted[n] - 1]; token t writes slots[n, t].
    """
    require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    return _fused_sigmoid_gating(problem, inputs, inputs["num_accepted"])


def vllm_packed_decode(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33's default for plain decoding: a token's q, k and v are one row."""
    require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    kernels = load("vllm.third_party.flash_linear_attention.ops.fused_recurrent")
    import torch

    x = Tensors.of(inputs)
    state, slots = above_null_slot(inputs["state"], x.slots)
    out = x.v.new_empty(problem.N, 1, problem.HV, problem.V)
    step = functools.partial(
        kernels.fused_recurrent_gated_delta_rule_packed_decode,
        mixed_qkv=torch.cat([part.flatten(1) for part in (x.q, x.k, x.v)], dim=1),
        a=x.a,
        b=x.b,
        A_log=x.A_log,
        dt_bias=x.dt_bias,
        scale=problem.K**-0.5,
        initial_state=state,
        out=out,
        use_qk_l2norm_in_kernel=True,
    )

    def run(i: int) -> None:
        step(ssm_state_indices=slots[i % len(slots)])

    warm_up(run, state, slots[0])
    return Call(
        run=run,
        result=lambda: {"state": to_numpy(state[1:]), "out": to_numpy(out.squeeze(1))},
        kernels=named("fused_recurrent_gated_delta_rule_packed_decode_kernel"),
        note="q, k, v packed beforehand",
    )


def vllm_post_conv(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33's update with its gated norm, two launches, after the convolution.

    `inputs` also holds z [N*T, HV*V] and norm_weight [V]; of one token a row slots are
    [N]. `result` has the first call's out alone."""
    folder = "vllm.third_party.flash_linear_attention.ops"
    kernels = load(f"{folder}.fused_gdn_decode_post_conv_mtp")
    import torch

    x = Tensors.of(inputs)
    state, slots = above_null_slot(inputs["state"], x.slots)
    slots = [table.reshape(problem.N, problem.T).int() for table in slots]
    out = torch.empty_like(x.v)
    accepted = inputs["num_accepted"]
    if accepted is None:
        accepted = torch.ones(problem.N, dtype=torch.int32, device=state.device)
    else:
        accepted = copy(accepted)
    bounds = torch.arange(problem.N + 1, device=state.device) * problem.T
    step = functools.partial(
        kernels.fused_gdn_decode_post_conv_mtp_triton,
        torch.cat([part.flatten(1) for part in (x.q, x.k, x.v)], dim=1),
        x.a,
        x.b,
        x.A_log,
        x.dt_bias,
        cu_seqlens=bounds.int(),
        num_accepted_tokens=accepted,
        state=state,
        output_gate=copy(inputs["z"]).reshape(x.v.shape),
        norm_weight=copy(inputs["norm_weight"]),
        out=out,
        scale=problem.K**-0.5,
        norm_eps=1e-6,
        output_gate_activation="silu",
    )

    def run(i: int) -> None:
        step(state_indices=slots[i % len(slots)])

    return Call(
        run=run,
        result=lambda: {"out": to_numpy(out)},
        kernels=named("_gdn_mtp_"),
        note="q, k, v were convolved before",
    )


def _fused_sigmoid_gating(
    problem: Problem, inputs: Inputs, num_accepted: jax.Array | None
) -> Call:
    """vLLM's kernel on packed tokens with cu_seqlens, as vLLM calls it in serving."""
    blocks = problem.N * problem.HV
    require(blocks <= 65535, f"launches N*HV <= 65535 blocks along z; got {blocks}")
    kernels = load("vllm.third_party.flash_linear_attention.ops.fused_sigmoid_gating")
    import torch

    x = Tensors.of(inputs)
    state, slots = above_null_slot(inputs["state"], x.slots)
    boundaries = torch.arange(problem.N + 1, device=state.device) * problem.T
    step = functools.partial(
        kernels.fused_sigmoid_gating_delta_rule_update,
        A_log=x.A_log,
        a=x.a,
        b=x.b,
        dt_bias=x.dt_bias,
        q=x.q.unsqueeze(0),
        k=x.k.unsqueeze(0),
        v=x.v.unsqueeze(0),
        scale=problem.K**-0.5,
        initial_state=state,
        inplace_final_state=True,
        cu_seqlens=boundaries.int(),
        num_accepted_tokens=None if num_accepted is None else copy(num_accepted),
        use_qk_l2norm_in_kernel=True,
    )
    out = x.v

    def run(i: int) -> None:
        nonlocal out
        out, _ = step(ssm_state_indices=slots[i % len(slots)])

    warm_up(run, state, slots[0])
    return Call(
        run=run,
        result=lambda: {"state": to_numpy(state[1:]), "out": to_numpy(out.squeeze(0))},
        kernels=named("fused_sigmoid_gating_delta_rule_update_kernel"),
        note="",
    )


def above_null_slot(
    array: jax.Array, slots: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The pool and the tables one slot up: vLLM's slot 0 is nobody's and is skipped."""
    pool = view(array)
    state = pool.new_zeros(pool.shape[0] + 1, *pool.shape[1:])
    state[1:] = pool
    return state, [table + 1 for table in slots]
