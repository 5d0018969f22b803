"""flash-linear-attention 0.6.0's kernels."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from peers.call import Call, Inputs, Problem, Result, load, require
from peers.tensors import Tensors, copy, named, to_numpy

if TYPE_CHECKING:
    from torch import Tensor

# `state` and the tokens, in the order of our own ops' arguments.
NAMES = ("state", "q", "k", "v", "a", "b")


def fla_fused_recurrent(problem: Problem, inputs: Inputs) -> Call:
    """flash-linear-attention 0.6.0: no pool, no gates, a new state array each call.

    A table's rows are gathered beforehand, and the states that a call returns are what
    the next call on that table starts from, as they would be in a pool.
    """
    require(problem.T == 1, f"is timed on one token a row; got T={problem.T}")
    require(
        problem.state_dtype == "float32",
        f"writes its states in float32 only; got {problem.state_dtype}",
    )
    kernels = load("fla.ops.gated_delta_rule")
    import torch

    x = Tensors.of(inputs)
    rows = x.rows(problem)
    pool = copy(inputs["state"])
    tables = [table.long() for table in x.slots]
    states = [pool[table] for table in tables]
    raw_decay = rows["a"].float() + x.dt_bias.float()
    step = functools.partial(
        kernels.fused_recurrent_gated_delta_rule,
        q=rows["q"],
        k=rows["k"],
        v=rows["v"],
        g=-x.A_log.exp() * torch.nn.functional.softplus(raw_decay),
        beta=rows["b"].float().sigmoid(),
        scale=problem.K**-0.5,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        state_v_first=True,
    )
    out, _ = step(initial_state=states[0])
    torch.cuda.synchronize()

    def run(i: int) -> None:
        nonlocal out
        table = i % len(states)
        out, states[table] = step(initial_state=states[table])

    def result() -> Result:
        slots = torch.cat(tables)
        if slots.unique().numel() < slots.numel():
            return {"out": to_numpy(out.squeeze(1))}
        after = pool.index_copy(0, slots, torch.cat(states))
        return {"state": to_numpy(after), "out": to_numpy(out.squeeze(1))}

    return Call(
        run=run,
        result=result,
        kernels=named("fused_recurrent_gated_delta_rule_fwd_kernel"),
        note="gates precomputed, rows gathered beforehand, new state array",
    )


def fla_chunk(problem: Problem, inputs: Inputs) -> Call:
    """flash-linear-attention 0.6.0's chunked forward, from raw logits as ours."""
    step, sets = _chunk(problem, inputs)
    note = "gates, sigmoid and norms in its own kernels; dots and W, U in bfloat16"
    return _forward(step, sets, note)


def fla_chunk_given_gates(problem: Problem, inputs: Inputs) -> Call:
    """The same with log-decay and beta ready in memory: its fastest form."""
    step, sets = _chunk(problem, inputs, use_gate=False)
    import torch

    A_log, dt_bias = copy(inputs["A_log"]), copy(inputs["dt_bias"])
    for x in sets:
        raw_decay = x["a"].float() + dt_bias
        x["a"] = -A_log.exp() * torch.nn.functional.softplus(raw_decay)
        x["b"] = x["b"].float().sigmoid()
    return _forward(step, sets, "gates precomputed; dots and W, U in bfloat16")


def fla_chunk_forward(problem: Problem, inputs: Inputs) -> Call:
    """The forward of a training problem alone: what a backward is added to."""
    forward = dataclasses.replace(problem, backward=False)
    call = fla_chunk(forward, inputs)
    note = "forward alone; " + call.note
    return dataclasses.replace(call, note=note, moved_bytes=forward.moved_bytes)


def fla_chunk_train(problem: Problem, inputs: Inputs) -> Call:
    """Its forward and backward, from the cotangents of out and of the final state.

    Its backward refuses some pairs of GPU and Triton, where it would be wrong; the
    error that says so is the reason why the row is absent.
    """
    step, sets = _chunk(problem, inputs)
    import torch

    shared = {name: step.keywords[name] for name in ("A_log", "dt_bias")}
    for x in sets:
        x.update(shared)
    leaves = (*NAMES, *shared)
    for tensor in {id(x[name]): x[name] for x in sets for name in leaves}.values():
        tensor.requires_grad_()
    held: dict[str, Tensor] = {}

    def run(i: int) -> None:
        x = sets[i % len(sets)]
        out, state = _apply(step, x)
        cotangents = (x["out_weights"], x["state_weights"])
        wanted = [x[name] for name in leaves]
        found = torch.autograd.grad((out, state), wanted, cotangents)
        held.update(zip((f"d_{name}" for name in leaves), found, strict=True))
        held.update(out=out.detach(), state=state.detach())

    run(0)
    torch.cuda.synchronize()
    return Call(
        run=run,
        result=lambda: {name: to_numpy(tensor) for name, tensor in held.items()},
        kernels=lambda name: True,
        note="dots in bfloat16",
    )


def _chunk(
    problem: Problem, inputs: Inputs, *, use_gate: bool = True
) -> tuple[functools.partial[Any], list[dict[str, Tensor]]]:
    """The op, still to be given a set's state and tokens, and the sets."""
    require(
        problem.state_dtype == "float32",
        f"writes its states in float32 only; got {problem.state_dtype}",
    )
    kernels = load("fla.ops.gated_delta_rule")
    options: dict[str, Any] = {}
    if inputs["cu_seqlens"] is not None:
        # one tensor for all calls: what FLA derives from it, it keeps by identity
        options["cu_seqlens"] = copy(inputs["cu_seqlens"]).long()
    if use_gate:
        options |= dict(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
        options |= {name: copy(inputs[name]) for name in ("A_log", "dt_bias")}
    step = functools.partial(
        kernels.chunk_gated_delta_rule,
        scale=problem.K**-0.5,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        state_v_first=True,
        **options,
    )
    sets = [
        {name: copy(array) for name, array in arrays.items()}
        for arrays in inputs["sets"]
    ]
    return step, sets


def _apply(step: functools.partial[Any], x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Packed tokens are a batch of one."""
    tokens = dict(q=x["q"], k=x["k"], v=x["v"], g=x["a"], beta=x["b"])
    if "cu_seqlens" not in step.keywords:
        return step(**tokens, initial_state=x["state"])
    tokens = {name: tensor.unsqueeze(0) for name, tensor in tokens.items()}
    out, state = step(**tokens, initial_state=x["state"])
    return out.squeeze(0), state


def _forward(
    step: functools.partial[Any], sets: list[dict[str, Tensor]], note: str
) -> Call:
    """A call starts from the state that the last call on its set returned."""
    import torch

    out, _ = _apply(step, sets[0])
    last = sets[0]

    def run(i: int) -> None:
        nonlocal out, last
        last = sets[i % len(sets)]
        out, last["state"] = _apply(step, last)

    torch.cuda.synchronize()
    return Call(
        run=run,
        result=lambda: {"state": to_numpy(last["state"]), "out": to_numpy(out)},
        kernels=lambda name: True,
        note=note + "; a new state array at each call",
    )
