"""Other projects' Gated DeltaNet kernels, laid out to be timed and compared with ours.

Each peer is a function `peer(problem, inputs) -> Call`. It takes the arrays that our
own kernel takes, brings them into the layout that the peer wants, compiles, and leaves
a `run` that launches the peer's kernel and nothing else. A peer that is not installed,
or that does not do this problem, raises `Unavailable` with the reason.

`inputs` holds JAX arrays on the GPU: state [P, HV, V, K]; q, k [N*T, H, K];
v [N*T, HV, V]; a, b [N*T, HV] (raw logits); A_log, dt_bias [HV]; slots, a list of
tables to take turns with ([N], or [N, T] for verify; every entry a live slot, and none
twice in a table); and for verify num_accepted [N].

All peers normalise q and k in the kernel and scale q by K**-0.5. torch and the peers
are imported when a peer is asked for; where they lie is the caller's PYTHONPATH: vLLM
0.33 (its Triton files alone will do), fla-core 0.6.0, and FlashInfer 0.6.18's
gdn_kernels folder as the package `flashinfer_gdn`, with the CUTLASS DSL that it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import jax
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Problem(Protocol):
    """The sizes and dtypes of one measurement; dtypes are "float32" or "bfloat16"."""

    @property
    def N(self) -> int: ...  # rows
    @property
    def T(self) -> int: ...  # tokens of a row: 1 decodes, more verify drafts
    @property
    def H(self) -> int: ...  # key heads
    @property
    def HV(self) -> int: ...  # value heads
    @property
    def K(self) -> int: ...  # key head dim
    @property
    def V(self) -> int: ...  # value head dim
    @property
    def P(self) -> int: ...  # slots of the state pool
    @property
    def state_dtype(self) -> str: ...
    @property
    def act_dtype(self) -> str: ...


Inputs: TypeAlias = Mapping[str, Any]
Result: TypeAlias = tuple[np.ndarray | None, np.ndarray]


class Unavailable(Exception):
    """A peer is not installed here, or does not do this problem; says why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A peer that is compiled and ready to be timed.

    run(i): launches the i-th call, on slot table i modulo their number.
    result(): the pool [P, HV, V, K] after the calls, or None where it cannot be told,
        and the last call's out [N*T, HV, V]; both float32.
    kernels(name): whether a device kernel of this name belongs to the peer.
    note: what this peer does less or more than our kernel.
    """

    run: Callable[[int], None]
    result: Callable[[], Result]
    kernels: Callable[[str], bool]
    note: str


Peer: TypeAlias = Callable[[Problem, Inputs], Call]


def vllm_fused_sigmoid_gating(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33, the kernel this project ports, on one token a row."""
    _require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    return _fused_sigmoid_gating(problem, inputs, num_accepted=None)


def vllm_fused_sigmoid_gating_verify(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33, the same kernel verifying drafts: a state is written after each token.

    Row n starts from slot slots[n, num_accepted[n] - 1]; token t writes slots[n, t].
    """
    _require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    return _fused_sigmoid_gating(problem, inputs, inputs["num_accepted"])


def vllm_packed_decode(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33's default for plain decoding: a token's q, k and v are one row."""
    _require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    kernels = _load("vllm.third_party.flash_linear_attention.ops.fused_recurrent")
    import torch

    x = _Tensors.of(inputs)
    state, slots = _above_null_slot(inputs["state"], x.slots)
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

    _warm_up(run, state, slots[0])
    return Call(
        run=run,
        result=lambda: (_to_numpy(state[1:]), _to_numpy(out.squeeze(1))),
        kernels=_named("fused_recurrent_gated_delta_rule_packed_decode_kernel"),
        note="q, k, v packed beforehand",
    )


def fla_fused_recurrent(problem: Problem, inputs: Inputs) -> Call:
    """flash-linear-attention 0.6.0: no pool, no gates, a new state array each call.

    A table's rows are gathered beforehand, and the states that a call returns are what
    the next call on that table starts from, as they would be in a pool.
    """
    _require(problem.T == 1, f"is timed on one token a row; got T={problem.T}")
    _require(
        problem.state_dtype == "float32",
        f"writes its states in float32 only; got {problem.state_dtype}",
    )
    kernels = _load("fla.ops.gated_delta_rule")
    import torch

    x = _Tensors.of(inputs)
    rows = x.rows(problem)
    pool = _copy(inputs["state"])
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
            return None, _to_numpy(out.squeeze(1))
        after = pool.index_copy(0, slots, torch.cat(states))
        return _to_numpy(after), _to_numpy(out.squeeze(1))

    return Call(
        run=run,
        result=result,
        kernels=_named("fused_recurrent_gated_delta_rule_fwd_kernel"),
        note="gates precomputed, rows gathered beforehand, new state array",
    )


def flashinfer_decode(problem: Problem, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18, one token a row, the state updated in the pool.

    A float32 and a bfloat16 state have kernels of their own.
    """
    _require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    kernels = _load_flashinfer(problem, float32="gdn_decode_pretranspose")
    x = _Tensors.of(inputs)
    state = _copy(inputs["state"])
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

    _warm_up(run, state, x.slots[0])
    return Call(
        run=run,
        result=lambda: (_to_numpy(state), _to_numpy(out.squeeze(1))),
        kernels=_named("kernel_cutlass_gdn_"),
        note="out is reused (the public wrapper zeroes a new one for a float32 state)",
    )


def flashinfer_mtp(problem: Problem, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18 verifying drafts: a state is cached after each token.

    The states go to a buffer [N, T, HV, V, K] beside the pool; there are as many such
    buffers as the pool holds disjoint slot tables, so that no call finds its own in the
    L2 cache. `result` puts them where vLLM's kernel would have written them.
    """
    _require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    kernels = _load_flashinfer(problem, float32="gdn_decode_mtp")
    cached = problem.N * problem.T * problem.HV * problem.V * problem.K
    _require(
        cached < 2**31 or problem.state_dtype == "bfloat16",
        f"counts a float32 cache's elements in int32; got N*T*HV*V*K = {cached}",
    )
    x = _Tensors.of(inputs)
    state = _copy(inputs["state"])
    starts = _start_slots(problem, x.slots, _copy(inputs["num_accepted"]))
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
        return _to_numpy(after), _to_numpy(out.flatten(0, 1))

    _warm_up(run, state, x.slots[0])
    tables.clear()
    return Call(
        run=run,
        result=result,
        kernels=_named("kernel_cutlass_gdn_"),
        note=(
            "states cached beside the pool, which is only read: a table that comes "
            "round again starts from the same states"
        ),
    )


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


def _fused_sigmoid_gating(
    problem: Problem, inputs: Inputs, num_accepted: jax.Array | None
) -> Call:
    """vLLM's kernel on packed tokens with cu_seqlens, as vLLM calls it in serving."""
    blocks = problem.N * problem.HV
    _require(blocks <= 65535, f"launches N*HV <= 65535 blocks along z; got {blocks}")
    kernels = _load("vllm.third_party.flash_linear_attention.ops.fused_sigmoid_gating")
    import torch

    x = _Tensors.of(inputs)
    state, slots = _above_null_slot(inputs["state"], x.slots)
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
        num_accepted_tokens=None if num_accepted is None else _copy(num_accepted),
        use_qk_l2norm_in_kernel=True,
    )
    out = x.v

    def run(i: int) -> None:
        nonlocal out
        out, _ = step(ssm_state_indices=slots[i % len(slots)])

    _warm_up(run, state, slots[0])
    return Call(
        run=run,
        result=lambda: (_to_numpy(state[1:]), _to_numpy(out.squeeze(0))),
        kernels=_named("fused_sigmoid_gating_delta_rule_update_kernel"),
        note="",
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


def _flashinfer_arguments(problem: Problem, x: _Tensors, out: Tensor) -> dict[str, Any]:
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
    _require(problem.K == problem.V == 128, f"does K = V = 128 only; {heads}")
    _require(problem.HV > 1, f"cannot tell the strides of one value head; {heads}")
    _require(
        problem.act_dtype == "bfloat16",
        f"computes on bfloat16 activations only; got {problem.act_dtype}",
    )
    _require(
        problem.state_dtype in ("float32", "bfloat16"),
        f"keeps a float32 or a bfloat16 state; got {problem.state_dtype}",
    )
    full = problem.state_dtype == "float32"
    return _load(f"flashinfer_gdn.{float32 if full else 'gdn_decode_bf16_state'}")


def _require(condition: bool, reason: str) -> None:
    """Raises Unavailable unless the peer does this problem."""
    if not condition:
        raise Unavailable(reason)


def _load(name: str) -> ModuleType:
    """A peer's module; some ask what the device is, so any error may come back."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(
            f"{name} does not import ({type(error).__name__}: {error}); put the peers "
            "on PYTHONPATH as the head of benchmarks/peers.py says"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """A problem's inputs, the state apart, in memory that torch owns."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    slots: list[Tensor]

    @classmethod
    def of(cls, inputs: Inputs) -> _Tensors:
        names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
        slots = [_copy(table) for table in inputs["slots"]]
        return cls(**{name: _copy(inputs[name]) for name in names}, slots=slots)

    def rows(self, problem: Problem) -> dict[str, Tensor]:
        """The per-token inputs as [N, T, ...], which peers without packing take."""
        names = ("q", "k", "v", "a", "b")
        size = (problem.N, problem.T)
        return {name: getattr(self, name).unflatten(0, size) for name in names}


def _view(array: jax.Array) -> Tensor:
    """A JAX array as a torch tensor in the same memory: to read only."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def _copy(array: jax.Array) -> Tensor:
    """A JAX array's values in a dense tensor that torch owns and may write."""
    import torch

    return _view(array).clone(memory_format=torch.contiguous_format)


def _above_null_slot(
    array: jax.Array, slots: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The pool and the tables one slot up: vLLM's slot 0 is nobody's and is skipped."""
    pool = _view(array)
    state = pool.new_zeros(pool.shape[0] + 1, *pool.shape[1:])
    state[1:] = pool
    return state, [table + 1 for table in slots]


def _warm_up(run: Callable[[int], None], state: Tensor, slots: Tensor) -> None:
    """Compiles by one call, and puts the slots it wrote back to what they were."""
    import torch

    rows = slots.flatten().long()
    before = state[rows]
    run(0)
    state[rows] = before
    torch.cuda.synchronize()


def _named(part: str) -> Callable[[str], bool]:
    """Whether a device kernel's name holds this part."""
    return lambda name: part in name


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().float().numpy()
