"""vLLM 0.33's convolution kernels.

Its state is a pool [P, R, C] of the R = W - 1 + S - 1 inputs that a row still needs,
oldest first, which every call shifts; the kernels take it as [P, C, R].
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

from peers.call import Call, ConvProblem, Inputs, Result, load, require
from peers.tensors import copy, named, to_numpy, view, warm_up
from peers.vllm import above_null_slot

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
BLOCK = 8  # tokens of a program of `causal_conv1d_fn`


def vllm_conv_update(problem: ConvProblem, inputs: Inputs) -> Call:
    """One token a row, or a speculative step, in place: with cu_seqlens as vLLM's
    models call it, or on rows of one length, which it takes too."""
    require(
        problem.T == 1 or problem.S > 1,
        f"is timed on decoding and on verifying; got T={problem.T}, S={problem.S}",
    )
    kernels = load(MODULE)
    import torch

    state, xs, slots = _tensors(inputs)
    packed = inputs["cu_seqlens"] is not None
    xs = [x if packed else x.transpose(1, 2) for x in xs]  # [N, C, T]
    out = torch.empty_like(xs[0])
    options: dict[str, Any] = {}
    if problem.S > 1:
        options["num_accepted_tokens"] = copy(inputs["num_accepted"])
    if packed:
        options["query_start_loc"] = copy(inputs["cu_seqlens"])
        options["max_query_len"] = max(problem.lengths)
    step = functools.partial(
        kernels.causal_conv1d_update,
        conv_state=state.transpose(1, 2),
        weight=copy(inputs["weight"]),
        activation="silu",
        out=out,
        **options,
    )
    last = 0

    def run(i: int) -> None:
        nonlocal last
        last = i % len(xs)
        step(xs[last], conv_state_indices=slots[last])

    def result() -> Result:
        y = out if packed else out.transpose(1, 2)
        return {"state": _history(state, slots[last]), "out": to_numpy(y)}

    warm_up(run, state, slots[0])
    kernel = named("causal_conv1d_update_kernel")
    return Call(run, result, kernel, "out is reused; products in bfloat16")


def vllm_conv(problem: ConvProblem, inputs: Inputs) -> Call:
    """Whole sequences, packed, each from what its slot holds."""
    require(problem.S == 1, f"has no speculative form; got S={problem.S}")
    kernels = load(MODULE)
    import torch

    state, xs, slots = _tensors(inputs)
    shape, channels = xs[0].shape, problem.C
    lengths = problem.lengths or (problem.T,) * problem.N
    begin = torch.tensor([0, *lengths], device=state.device).cumsum(0)
    step = functools.partial(
        kernels.causal_conv1d_fn,
        weight=copy(inputs["weight"]),
        bias=None,
        conv_states=state.transpose(1, 2),
        query_start_loc=begin.int(),
        has_initial_state=begin.new_ones(problem.N, dtype=torch.bool),
        activation="silu",
        metadata=_metadata(lengths, state.device),
    )
    out, last = xs[0], 0

    def run(i: int) -> None:
        nonlocal out, last
        last = i % len(xs)
        x = xs[last].reshape(-1, channels).transpose(0, 1)
        out = step(x, cache_indices=slots[last])

    def result() -> Result:
        y = out.transpose(0, 1).reshape(shape)
        return {"state": _history(state, slots[last]), "out": to_numpy(y)}

    warm_up(run, state, slots[0])
    kernel = named("causal_conv1d_fwd_kernel")
    return Call(run, result, kernel, "products in bfloat16")


def _tensors(inputs: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The pool [P + 1, R, C], and each set's tokens and slots."""
    ring = inputs["state"].buffer.shape[2]
    dense = inputs["state"].to_dense(ring).swapaxes(1, 2)
    slots = [copy(x["slots"]) for x in inputs["sets"]]
    state, slots = above_null_slot(dense, slots)
    return state, [view(x["x"]) for x in inputs["sets"]], slots


def _history(state: Tensor, slots: Tensor) -> Any:
    return to_numpy(state[slots.long()].transpose(1, 2))


def _metadata(lengths: tuple[int, ...], device: Any) -> types.SimpleNamespace:
    """What vLLM makes of a batch once for all layers: each program's row, and which of
    the row's blocks it takes."""
    import torch

    blocks = [(n, i) for n, T in enumerate(lengths) for i in range(-(-T // BLOCK))]
    row, block = torch.tensor(blocks, dtype=torch.int32, device=device).unbind(1)
    row, block = row.contiguous(), block.contiguous()
    pointers = dict(batch_ptr=row, token_chunk_offset_ptr=block)
    tables = dict(tot=len(row), mlist=row, mlist_len=len(row), offsetlist=block)
    return types.SimpleNamespace(nums_dict={BLOCK: tables | pointers}, **pointers)
