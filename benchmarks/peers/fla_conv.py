"""flash-linear-attention 0.6.0's short convolution: no pool; a row's cache [C, W] holds
its last W inputs, of which the oldest is never used."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from peers.call import Call, ConvProblem, Inputs, Result, load, require
from peers.tensors import copy, to_numpy, view

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "fla.modules.causal_conv1d.ops"
TUNED = "tuned for this problem"


def fla_conv_update(problem: ConvProblem, inputs: Inputs) -> Call:
    """One token a row; the rows of a table are gathered beforehand, and updated in
    place as they would be in a pool."""
    require(
        problem.T == 1 and problem.S == 1,
        f"decodes one token a row; got T={problem.T}, S={problem.S}",
    )
    kernels = load(MODULE)
    import torch

    caches, xs = _tensors(inputs)
    xs = [x.squeeze(1) for x in xs]
    step = functools.partial(
        kernels.causal_conv1d_update, weight=copy(inputs["weight"]), activation="silu"
    )
    out, last = xs[0], 0

    def run(i: int) -> None:
        nonlocal out, last
        last = i % len(xs)
        out, _ = step(x=xs[last], cache=caches[last])

    _forget_tuning(kernels.causal_conv1d_update_kernel)
    before = caches[0].clone()
    run(0)
    caches[0].copy_(before)
    torch.cuda.synchronize()
    return Call(
        run=run,
        result=lambda: _result(caches[last], out.unsqueeze(1)),
        kernels=lambda name: True,
        note=f"rows gathered beforehand; {TUNED}",
    )


def fla_conv(problem: ConvProblem, inputs: Inputs) -> Call:
    """Whole sequences; a call starts from the caches that the last one on its set
    returned."""
    require(problem.S == 1, f"has no speculative form; got S={problem.S}")
    kernels = load(MODULE)
    import torch

    caches, xs = _tensors(inputs)
    shape = xs[0].shape
    options: dict[str, Any] = {}
    if inputs["cu_seqlens"] is not None:
        xs = [x.unsqueeze(0) for x in xs]  # packed tokens are a batch of one
        # one tensor for all calls: what FLA derives from it, it keeps by identity
        options["cu_seqlens"] = copy(inputs["cu_seqlens"]).long()
    step = functools.partial(
        kernels.causal_conv1d,
        weight=copy(inputs["weight"]),
        output_final_state=True,
        activation="silu",
        **options,
    )
    out, last = xs[0], 0

    def run(i: int) -> None:
        nonlocal out, last
        last = i % len(xs)
        out, caches[last] = step(x=xs[last], initial_state=caches[last])

    _forget_tuning(kernels.causal_conv1d_fwd_kernel)
    before = caches[0]
    run(0)
    caches[0] = before
    torch.cuda.synchronize()
    return Call(
        run=run,
        result=lambda: _result(caches[last], out.view(shape)),
        kernels=lambda name: True,
        note=f"rows gathered beforehand; new caches at each call; {TUNED}",
    )


def _tensors(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Each set's caches [N, C, W] and tokens."""
    import torch

    state = inputs["state"]
    history = copy(state.to_dense(state.buffer.shape[2]))
    unused = torch.zeros_like(history[..., :1])
    pool = torch.cat([unused, history], dim=2)
    caches = [pool[copy(x["slots"]).long()] for x in inputs["sets"]]
    return caches, [view(x["x"]) for x in inputs["sets"]]


def _result(cache: Tensor, out: Tensor) -> Result:
    return {"state": to_numpy(cache[..., 1:]), "out": to_numpy(out)}


def _forget_tuning(kernel: Any) -> None:
    """FLA tunes for channels and width alone; one batch's launch is not another's."""
    kernel.fn.cache.clear()
