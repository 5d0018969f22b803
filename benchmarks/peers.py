"""Other projects' Gated DeltaNet kernels, laid out to be timed and compared with ours.

Each peer is a function `peer(problem, inputs) -> Call`. It takes the arrays that our
own kernel takes, brings them into the layout that the peer wants, compiles, and leaves
a `run` that launches the peer's kernel and nothing else. A peer that is not installed,
or that does not do this problem, raises `Unavailable` with the reason.

`inputs` holds JAX arrays on the GPU: state [P, HV, V, K]; q, k [N*T, H, K];
v [N*T, HV, V]; a, b [N*T, HV] (raw logits); A_log, dt_bias [HV]; slots, a list of
tables to take turns with ([N], or [N, T] for verify; every entry is a live slot and no
slot stands twice in a table); and for verify num_accepted [N].

`shared/tools/fetch_peers.sh` lays the sources; what has to be on PYTHONPATH is written
at its head.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
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
    def T(self) -> int: ...  # tokens of a row: 1 decodes, more verifies
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
    """A peer is not installed here, or does not do this problem; says which and why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A peer that is ready to be timed.

    run(i): launches the i-th call, on slot table i modulo their number.
    result(): the pool [P, HV, V, K] after the calls, or None where the peer keeps none
        that can be compared, and the last call's out [N*T, HV, V]; both float32.
    kernels(name): whether a device kernel of this name belongs to the peer.
    note: what this peer does less or more than our kernel.
    """

    run: Callable[[int], None]
    result: Callable[[], Result]
    kernels: Callable[[str], bool]
    note: str


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

    def rows(self, problem: Problem) -> dict[str, Tensor]:
        """The per-token inputs as [N, T, ...], which peers without packing take."""
        size = (problem.N, problem.T)
        names = ("q", "k", "v", "a", "b")
        return {name: getattr(self, name).unflatten(0, size) for name in names}


def vllm_fused_sigmoid_gating(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33, the kernel this project ports, on one token a row."""
    _require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    return _fused_sigmoid_gating(problem, inputs, "")


def vllm_fused_sigmoid_gating_verify(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33, the same kernel verifying drafts: a state is written after each token.

    Row n starts from slot slots[n, num_accepted[n] - 1] and token t writes slots[n, t].
    """
    _require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    return _fused_sigmoid_gating(problem, inputs, "a state written after each token")


def vllm_packed_decode(problem: Problem, inputs: Inputs) -> Call:
    """vLLM 0.33's default for plain decoding: q, k and v are one packed row."""
    _require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    kernels = _load("vllm.third_party.flash_linear_attention.ops.fused_recurrent")
    import torch

    x = _tensors(inputs)
    state, slots = _above_null_slot(inputs["state"], x.slots)
    qkv = torch.cat([part.flatten(1) for part in (x.q, x.k, x.v)], dim=1)
    out = x.v.new_empty(problem.N, 1, problem.HV, problem.V)

    def run(i: int) -> None:
        kernels.fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=qkv,
            a=x.a,
            b=x.b,
            A_log=x.A_log,
            dt_bias=x.dt_bias,
            scale=problem.K**-0.5,
            initial_state=state,
            out=out,
            ssm_state_indices=slots[i % len(slots)],
            use_qk_l2norm_in_kernel=True,
        )

    _warm_up(run, state, slots[0])
    return Call(
        run=run,
        result=lambda: (_to_numpy(state[1:]), _to_numpy(out.squeeze(1))),
        kernels=_named("fused_recurrent_gated_delta_rule_packed_decode_kernel"),
        note="q, k, v packed beforehand",
    )


def fla_fused_recurrent(problem: Problem, inputs: Inputs) -> Call:
    """flash-linear-attention 0.6.0: no pool, no gates, a new state array a call.

    A table's rows are gathered beforehand, and a call's new states are what the next
    call on that table starts from, as they would be in a pool.
    """
    _require(problem.T == 1, f"is timed on one token a row; got T={problem.T}")
    _require(
        problem.state_dtype == "float32",
        f"writes its states in float32 only; got {problem.state_dtype}",
    )
    kernels = _load("fla.ops.gated_delta_rule")
    import torch

    x = _tensors(inputs)
    pool = _copy(inputs["state"])
    tables = [slots.long() for slots in x.slots]
    states = [pool[table] for table in tables]
    rows = x.rows(problem)
    raw_decay = rows["a"].float() + x.dt_bias.float()
    log_decay = -x.A_log.exp() * torch.nn.functional.softplus(raw_decay)
    beta = rows["b"].float().sigmoid()
    out = rows["v"]

    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.fused_recurrent_gated_delta_rule(
            q=rows["q"],
            k=rows["k"],
            v=rows["v"],
            g=log_decay,
            beta=beta,
            scale=problem.K**-0.5,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            state_v_first=True,
        )

    def run(i: int) -> None:
        nonlocal out
        table = i % len(states)
        out, states[table] = step(states[table])

    def result() -> Result:
        slots = torch.cat(tables)
        if slots.unique().numel() < slots.numel():
            return None, _to_numpy(out.squeeze(1))
        after = pool.index_copy(0, slots, torch.cat(states))
        return _to_numpy(after), _to_numpy(out.squeeze(1))

    step(states[0])
    torch.cuda.synchronize()
    return Call(
        run=run,
        result=result,
        kernels=_named("fused_recurrent_gated_delta_rule_fwd_kernel"),
        note="gates precomputed, rows gathered beforehand, new state array",
    )


def flashinfer_decode(problem: Problem, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18, one token a row, the state updated in the pool.

    A float32 and a bfloat16 state have kernels of their own there.
    """
    _require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    _require_flashinfer(problem)
    full = problem.state_dtype == "float32"
    name = "gdn_decode_pretranspose" if full else "gdn_decode_bf16_state"
    kernels = _load(f"flashinfer_gdn.{name}")

    x = _tensors(inputs)
    state = _copy(inputs["state"])
    rows = x.rows(problem)
    gates = {"A_log": x.A_log, "dt_bias": x.dt_bias.float()}
    out = rows["v"].new_empty(rows["v"].shape)
    sizes = (problem.N, problem.T, problem.H, problem.HV, problem.K, problem.V)
    sizes = dict(zip(("B", "T", "H", "HV", "K", "V"), sizes, strict=True))

    def run_float32(i: int) -> None:
        kernels.run_pretranspose_decode(
            h0_source=state,
            **gates,
            **rows,
            output=out,
            **sizes,
            scale=problem.K**-0.5,
            use_qk_l2norm=True,
            use_pool_indexing=True,
            initial_state_indices=x.slots[i % len(x.slots)],
        )

    def run_bfloat16(i: int) -> None:
        kernels.gated_delta_rule(
            **gates,
            **rows,
            initial_state_source=state,
            initial_state_indices=x.slots[i % len(x.slots)],
            output=out,
            use_qk_l2norm_in_kernel=True,
            scale=problem.K**-0.5,
        )

    run = run_float32 if full else run_bfloat16
    _warm_up(run, state, x.slots[0])
    return Call(
        run=run,
        result=lambda: (_to_numpy(state), _to_numpy(out.squeeze(1))),
        kernels=_named("kernel_cutlass_gdn_"),
        note="out allocated beforehand (its public wrapper zeroes a new one each call)",
    )


def flashinfer_mtp(problem: Problem, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18 verifying drafts: a state is cached after each token.

    The states go to a buffer [N, T, HV, V, K] beside the pool, one buffer for each slot
    table where the pool is large enough for them to be disjoint; `result` puts them
    into the pool, at the slots where vLLM's kernel would have written them.
    """
    _require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    _require_flashinfer(problem)
    full = problem.state_dtype == "float32"
    name = "gdn_decode_mtp" if full else "gdn_decode_bf16_state"
    kernels = _load(f"flashinfer_gdn.{name}")

    x = _tensors(inputs)
    state = _copy(inputs["state"])
    starts = _start_slots(x.slots, _copy(inputs["num_accepted"]), state)
    disjoint = problem.P // (problem.N * problem.T)
    count = max(1, min(len(x.slots), disjoint))
    token_states = state.new_empty(count, problem.N, problem.T, *state.shape[1:])
    out = x.v.new_empty(problem.N, problem.T, problem.HV, problem.V)
    launch = (_mtp_float32 if full else _mtp_bfloat16)(problem, x, kernels, state, out)
    tables: dict[int, int] = {}

    def run(i: int) -> None:
        table = i % len(x.slots)
        tables[table % count] = table
        launch(starts[table], token_states[table % count])

    def result() -> Result:
        after = state.clone()
        for buffer, table in tables.items():
            slots = x.slots[table].flatten().long()
            after[slots] = token_states[buffer].flatten(0, 1)
        return _to_numpy(after), _to_numpy(out.flatten(0, 1))

    _warm_up(run, state, x.slots[0])
    tables.clear()
    return Call(
        run=run,
        result=result,
        kernels=_named("kernel_cutlass_gdn_"),
        note=(
            "states cached beside the pool, which it only reads: a table that comes "
            "round again starts from the same states"
        ),
    )


Peer: TypeAlias = Callable[[Problem, Inputs], Call]

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


def _fused_sigmoid_gating(problem: Problem, inputs: Inputs, note: str) -> Call:
    """vLLM's kernel on packed tokens with cu_seqlens, as vLLM calls it in serving."""
    _require(
        problem.N * problem.HV <= 65535,
        f"launches N*HV blocks along z, at most 65535; got {problem.N * problem.HV}",
    )
    kernels = _load("vllm.third_party.flash_linear_attention.ops.fused_sigmoid_gating")
    import torch

    x = _tensors(inputs)
    state, slots = _above_null_slot(inputs["state"], x.slots)
    accepted = None if problem.T == 1 else _copy(inputs["num_accepted"])
    q, k, v = (part.unsqueeze(0) for part in (x.q, x.k, x.v))
    boundaries = torch.arange(problem.N + 1, device=v.device) * problem.T
    boundaries = boundaries.int()
    out = v

    def run(i: int) -> None:
        nonlocal out
        out, _ = kernels.fused_sigmoid_gating_delta_rule_update(
            A_log=x.A_log,
            a=x.a,
            b=x.b,
            dt_bias=x.dt_bias,
            q=q,
            k=k,
            v=v,
            scale=problem.K**-0.5,
            initial_state=state,
            inplace_final_state=True,
            cu_seqlens=boundaries,
            ssm_state_indices=slots[i % len(slots)],
            num_accepted_tokens=accepted,
            use_qk_l2norm_in_kernel=True,
        )

    _warm_up(run, state, slots[0])
    return Call(
        run=run,
        result=lambda: (_to_numpy(state[1:]), _to_numpy(out.squeeze(0))),
        kernels=_named("fused_sigmoid_gating_delta_rule_update_kernel"),
        note=note,
    )


def _mtp_float32(
    problem: Problem, x: _Tensors, kernels: ModuleType, state: Tensor, out: Tensor
) -> Callable[[Tensor, Tensor], None]:
    """A launch of FlashInfer's float32 verify kernel, as its public wrapper does it."""
    size = (problem.N, problem.T, problem.HV, problem.V, problem.K)
    _require(
        math.prod(size) < 2**31,
        f"counts its cached states' elements in int32; got [N, T, HV, V, K] = {size}",
    )
    N, T, HV, V, _ = size
    tile_v = kernels.get_tile_v_mtp(N, T, num_v_heads=HV, v_dim=V)
    vec_size = kernels.get_vec_size_mtp(N, T)
    rows = x.rows(problem)
    dt_bias = x.dt_bias.float()

    def launch(starts: Tensor, token_states: Tensor) -> None:
        kernels.run_mtp_decode(
            h0_source=state.flatten(0, 1),
            intermediate_states=token_states.flatten(0, 2),
            A_log=x.A_log,
            dt_bias=dt_bias,
            **rows,
            output=out,
            initial_state_indices=starts,
            B=N,
            T=T,
            H=problem.H,
            HV=HV,
            K=problem.K,
            V=V,
            pool_size=problem.P,
            cache_steps=T,
            tile_v=tile_v,
            vec_size=vec_size,
            scale=problem.K**-0.5,
            use_qk_l2norm=True,
            disable_state_update=True,
            cache_intermediate_states=True,
        )

    return launch


def _mtp_bfloat16(
    problem: Problem, x: _Tensors, kernels: ModuleType, state: Tensor, out: Tensor
) -> Callable[[Tensor, Tensor], None]:
    """A launch of FlashInfer's bfloat16 verify kernel through its own dispatcher."""
    rows = x.rows(problem)
    dt_bias = x.dt_bias.float()

    def launch(starts: Tensor, token_states: Tensor) -> None:
        kernels.gated_delta_rule_mtp(
            A_log=x.A_log,
            dt_bias=dt_bias,
            **rows,
            initial_state_source=state,
            initial_state_indices=starts,
            intermediate_states_buffer=token_states,
            disable_state_update=True,
            use_qk_l2norm_in_kernel=True,
            scale=problem.K**-0.5,
            output=out,
        )

    return launch


def _start_slots(
    slots: list[Tensor], num_accepted: Tensor, state: Tensor
) -> list[Tensor]:
    """Each table's slot of the last accepted token, [N].

    FlashInfer's float32 verify kernel addresses the pool in the type of these indices.
    """
    wide = state.numel() >= 2**31 and state.element_size() == 4
    column = (num_accepted.long() - 1).unsqueeze(1)
    starts = [table.gather(1, column).squeeze(1) for table in slots]
    return [start.long() for start in starts] if wide else starts


def _require(condition: bool, reason: str) -> None:
    """Raises Unavailable unless the peer does this problem."""
    if not condition:
        raise Unavailable(reason)


def _require_flashinfer(problem: Problem) -> None:
    """Raises Unavailable where FlashInfer's kernels are not made for the problem."""
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


def _load(name: str) -> ModuleType:
    """A peer's module; many ask the device what it is, so any error may come back."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(
            f"{name} does not import ({type(error).__name__}: {error}); lay the peers "
            "with fetch_peers.sh and set PYTHONPATH as its head says"
        ) from error


def _copy(array: jax.Array) -> Tensor:
    """A JAX array's values in a dense tensor that torch owns, read-only or not."""
    import torch

    jax.block_until_ready(array)
    return torch.from_dlpack(array).clone(memory_format=torch.contiguous_format)


def _tensors(inputs: Inputs) -> _Tensors:
    names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
    slots = [_copy(table) for table in inputs["slots"]]
    return _Tensors(**{name: _copy(inputs[name]) for name in names}, slots=slots)


def _above_null_slot(
    array: jax.Array, slots: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The pool and the tables one slot up: vLLM's slot 0 is nobody's and is skipped."""
    import torch

    jax.block_until_ready(array)
    pool = torch.from_dlpack(array)
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
