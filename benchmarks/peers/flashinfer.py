"""FlashInfer 0.6.18's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peers.call import Call, Inputs, Problem, Result, load, require
from peers.tensors import Tensors, copy, named, to_numpy, warm_up

if TYPE_CHECKING:
    from torch import Tensor


def flashinfer_decode(problem: Problem, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18, one token a row, the state updated in the pool.

    A float32 and a bfloat16 state have kernels of their own.
    """
    require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    kernels = _load_flashinfer(problem, float32="gdn_decode_pretranspose")
    x = Tensors.of(inputs)
    state = copy(inputs["state"])
    out = x.v.new_empty(problem.N, 1, problem.HV, problem.V)
    given = _flashinfer_arguments(problem, x, out)
    if problem.state_dtype == "float32":
        step = functools.partial(
            kernels.run_pretranspose_decode,
            **given,
            **_flashinfer_sizes(problem),
            h0_source=state,
            use_qk_l2norm=True,
            use_pool_indexing=True,
        )
    else:
        step = functools.partial(
            kernels.gated_delta_rule,
            **given,
            initial_state_source=state,
            use_qk_l2norm_in_kernel=True,
        )

    def run(i: int) -> None:
        step(initial_state_indices=x.slots[i % len(x.slots)])

    warm_up(run, state, x.slots[0])
    return Call(
        run=run,
        result=lambda: {"state": to_numpy(state), "out": to_numpy(out.squeeze(1))},
        kernels=named("kernel_cutlass_gdn_"),
        note="out is reused (the public wrapper zeroes a new one for a float32 state)",
    )


def flashinfer_mtp(problem: Problem, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18 verifying drafts: a state is cached after each token.

    The states go to a buffer [N, T, HV, V, K] beside the pool; there are as many such
    buffers as the pool holds disjoint slot tables, so that no call finds its own in the
    L2 cache. `result` puts them where vLLM's kernel would have written them.
    """
    require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    kernels = _load_flashinfer(problem, float32="gdn_decode_mtp")
    cached = problem.N * problem.T * problem.HV * problem.V * problem.K
    require(
        cached < 2**31 or problem.state_dtype == "bfloat16",
        f"counts a float32 cache's elements in int32; got N*T*HV*V*K = {cached}",
    )
    x = Tensors.of(inputs)
    state = copy(inputs["state"])
    starts = _start_slots(problem, x.slots, copy(inputs["num_accepted"]))
    count = max(1, min(len(x.slots), problem.P // (problem.N * problem.T)))
    buffers = [
        state.new_empty(problem.N, problem.T, *state.shape[1:]) for _ in range(count)
    ]
    out = x.v.new_empty(problem.N, problem.T, problem.HV, problem.V)
    given = _flashinfer_arguments(problem, x, out)
    steps = _mtp_steps(problem, kernels, given, state, buffers)
    tables: dict[int, int] = {}

    def run(i: int) -> None:
        table = i % len(x.slots)
        tables[table % count] = table
        steps[table % count](initial_state_indices=starts[table])

    def result() -> Result:
        after = state.clone()
        for buffer, table in tables.items():
            after[x.slots[table].flatten().long()] = buffers[buffer].flatten(0, 1)
        return {"state": to_numpy(after), "out": to_numpy(out.flatten(0, 1))}

    warm_up(run, state, x.slots[0])
    tables.clear()
    return Call(
        run=run,
        result=result,
        kernels=named("kernel_cutlass_gdn_"),
        note=(
            "states cached beside the pool, which is only read: a table that comes "
            "round again starts from the same states"
        ),
    )


def _mtp_steps(
    problem: Problem,
    kernels: ModuleType,
    given: dict[str, Any],
    state: Tensor,
    buffers: list[Tensor],
) -> list[Callable[..., Any]]:
    """For each buffer the call that fills it, still to be given its start slots."""
    if problem.state_dtype == "bfloat16":
        mtp = functools.partial(
            kernels.gated_delta_rule_mtp,
            **given,
            initial_state_source=state,
            disable_state_update=True,
            use_qk_l2norm_in_kernel=True,
        )
        return [functools.partial(mtp, intermediate_states_buffer=b) for b in buffers]
    heads = {"num_v_heads": problem.HV, "v_dim": problem.V}
    mtp = functools.partial(
        kernels.run_mtp_decode,
        **given,
        **_flashinfer_sizes(problem),
        h0_source=state.flatten(0, 1),
        pool_size=problem.P,
        cache_steps=problem.T,
        tile_v=kernels.get_tile_v_mtp(problem.N, problem.T, **heads),
        vec_size=kernels.get_vec_size_mtp(problem.N, problem.T),
        use_qk_l2norm=True,
        disable_state_update=True,
        cache_intermediate_states=True,
    )
    flat = [buffer.flatten(0, 2) for buffer in buffers]
    return [functools.partial(mtp, intermediate_states=states) for states in flat]


def _start_slots(
    problem: Problem, slots: list[Tensor], num_accepted: Tensor
) -> list[Tensor]:
    """The slot of each row's last accepted token, [N] for each table.

    FlashInfer's float32 kernel addresses the pool in these indices' own type.
    """
    column = (num_accepted.long() - 1).unsqueeze(1)
    starts = [table.gather(1, column).squeeze(1) for table in slots]
    elements = problem.P * problem.HV * problem.V * problem.K
    if problem.state_dtype == "float32" and elements >= 2**31:
        return [start.long() for start in starts]
    return starts


def _flashinfer_arguments(problem: Problem, x: Tensors, out: Tensor) -> dict[str, Any]:
    """What all of FlashInfer's kernels take; they document dt_bias as float32."""
    return {
        **x.rows(problem),
        "A_log": x.A_log,
        "dt_bias": x.dt_bias.float(),
        "output": out,
        "scale": problem.K**-0.5,
    }


def _flashinfer_sizes(problem: Problem) -> dict[str, int]:
    sizes = {name: getattr(problem, name) for name in ("T", "H", "HV", "K", "V")}
    return {"B": problem.N, **sizes}


def _load_flashinfer(problem: Problem, float32: str) -> ModuleType:
    """The module for the problem's state, float32's being named, if it does it."""
    heads = f"got HV={problem.HV}, K={problem.K}, V={problem.V}"
    require(problem.K == problem.V == 128, f"does K = V = 128 only; {heads}")
    require(problem.HV > 1, f"cannot tell the strides of one value head; {heads}")
    require(
        problem.act_dtype == "bfloat16",
        f"computes on bfloat16 activations only; got {problem.act_dtype}",
    )
    require(
        problem.state_dtype in ("float32", "bfloat16"),
        f"keeps a float32 or a bfloat16 state; got {problem.state_dtype}",
    )
    full = problem.state_dtype == "float32"
    return load(f"flashinfer_gdn.{float32 if full else 'gdn_decode_bf16_state'}")
