"""Peers that write a state once in many steps: ReplaySSM and FlashInfer's u-cache.

`inputs` holds state [P, HV, V, K]; tables, lists of slots [N] that take turns; sets of
tokens that take turns, each of q, k [N, T, H, K], v [N, T, HV, V], A_log [HV], a, b
[N, T, HV] and dt_bias [HV]; accepted [steps, N], how many tokens of a row's step before
stand at each of its steps; and committed [P], how many records each slot has to begin
with. What those records say is drawn here, since every peer keeps them in a way of its
own: a check begins with none.

`run(i)` is step i, and the peer's counters move behind it; `result` has the last out
alone, [N, T, HV, V]. ReplaySSM's kernels are those of the repository
Johnny-Liou/ReplaySSM at commit a844494.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peers.call import Call, Inputs, load, require
from peers.tensors import copy, to_numpy

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = "vllm.model_executor.layers"
TOKENS = ("q", "k", "v", "A_log", "a", "b", "dt_bias")
WINDOW = 16  # records at the most before a row folds, as ours


def replayssm(problem: Any, inputs: Inputs) -> Call:
    """ReplaySSM, one token a row: no ring, and a row's own count says when it folds."""
    require(problem.T == 1, f"decodes one token a row; got T={problem.T}")
    _require_window(problem)
    kernels = load(f"{LAYERS}.fla.ops.fused_recurrent_replayssm")
    import torch

    x = _State.of(problem, inputs, WINDOW)
    out = x.state.new_empty(problem.N, 1, problem.HV, problem.V, dtype=torch.bfloat16)
    written = x.committed.clamp(max=WINDOW - 1)

    def run(i: int) -> None:
        slots = x.tables[i % len(x.tables)]
        mixed, tokens = x.mixed[i % len(x.mixed)], x.sets[i % len(x.sets)]
        of_rows = written[slots.long()]
        kernels.fused_recurrent_gated_delta_rule_replayssm(
            mixed,
            *(tokens[name].flatten(0, 1) for name in ("a", "b")),
            tokens["A_log"],
            tokens["dt_bias"],
            problem.K**-0.5,
            x.state,
            x.u,
            x.k,
            x.g,
            out,
            slots,
            of_rows,
            use_qk_l2norm_in_kernel=True,
        )
        written[slots.long()] = (of_rows + 1) % WINDOW

    return Call(
        run=run,
        result=lambda: {"out": to_numpy(out)},
        kernels=lambda name: "replayssm_kernel" in name,
        note="u in bfloat16; counters are moved by the caller, outside the time",
    )


def replayssm_verify(problem: Any, inputs: Inputs) -> Call:
    """ReplaySSM, verifying: a launch for rows that fold and one for those that do not,
    and a third that moves the counters."""
    require(problem.T > 1, f"verifies two tokens a row or more; got T={problem.T}")
    _require_window(problem)
    kernels = load(f"{LAYERS}.fla.ops.gdn_replayssm_spec_decode")
    import torch

    T, longest = problem.T, WINDOW + problem.T
    ring = 1 << (longest - 1).bit_length()
    x = _State.of(problem, inputs, ring)
    out = x.state.new_empty(problem.N * T, problem.HV, problem.V, dtype=torch.bfloat16)
    bounds = T * torch.arange(problem.N + 1, dtype=torch.int32, device=out.device)
    written, base = x.committed.clone(), torch.zeros_like(x.committed)
    folds = (written + 2 * T > longest).to(torch.int8)
    accepted = [row.contiguous() for row in torch.tensor(inputs["accepted"]).cuda()]

    def run(i: int) -> None:
        slots, tokens = x.tables[i % len(x.tables)], x.sets[i % len(x.sets)]
        counters = written, base, folds
        kernels.gdn_replayssm_spec_decode(
            x.mixed[i % len(x.mixed)],
            *(tokens[name].flatten(0, 1) for name in ("a", "b")),
            tokens["A_log"],
            tokens["dt_bias"],
            x.state,
            x.u,
            x.k,
            x.g,
            out,
            bounds,
            slots,
            *counters,
            max_cache_len=longest,
            max_spec_len=T,
        )
        stand = accepted[(i // len(x.tables) + 1) % len(accepted)]
        kernels.commit_gdn_replayssm_spec(*counters, stand, slots, longest, T, ring)

    return Call(
        run=run,
        result=lambda: {"out": to_numpy(out.unflatten(0, (problem.N, T)))},
        kernels=lambda name: "replayssm_spec" in name or "gdn_spec_cursors" in name,
        note=f"a float32 state is rounded to bfloat16 where it is read, and where it "
        f"is folded; a ring of {ring}; the time has the launch that moves counters",
    )


def flashinfer_ucache(problem: Any, inputs: Inputs) -> Call:
    """FlashInfer 0.6.18, verifying four or eight tokens on a bfloat16 state."""
    require(problem.T in (4, 8), f"verifies 4 or 8 tokens a row; got T={problem.T}")
    _require_window(problem)
    require(
        problem.state_dtype == "bfloat16",
        f"keeps a bfloat16 state; got {problem.state_dtype}",
    )
    require(problem.K == problem.V == 128, "does K = V = 128 only")
    kernels = load("flashinfer_gdn.gdn_decode_bf16_wy_ucache_flush")
    import torch

    T, ring = problem.T, 32
    x = _State.of(problem, inputs, ring, cumulative=True)
    lengths = [x.committed[table.long()].contiguous() for table in x.tables]
    bases = [torch.zeros_like(length) for length in lengths]
    accepted = [row.contiguous() for row in torch.tensor(inputs["accepted"]).cuda()]
    folds_at = WINDOW - T + 1
    made: list[Tensor] = []

    def run(i: int) -> None:
        group, tokens = i % len(x.tables), x.sets[i % len(x.sets)]
        length, base = lengths[group], bases[group]
        made[:] = [
            kernels.gated_delta_rule_mtp_ucache_flush(
                **tokens,
                scale=problem.K**-0.5,
                initial_state_source=x.state,
                initial_state_indices=x.tables[group],
                k_cache=x.k,
                u_cache=x.u,
                g_cache=x.g,
                hist_len=length,
                cache_base=base,
                restart_hist_on_flush=False,
            )
        ]
        stand = accepted[(i // len(x.tables) + 1) % len(accepted)]
        folds = length >= folds_at
        base.copy_(torch.where(folds, (base + length) % ring, base))
        length.copy_(torch.where(folds, 0, length) + stand)

    return Call(
        run=run,
        result=lambda: {"out": to_numpy(made[0])},
        kernels=lambda name: "cutlass" in name,
        note="u in bfloat16, A_log and dt_bias rounded to it; counters are moved by "
        "the caller, which is not in the time",
    )


class _State:
    """What all of these keep, in memory that torch owns; slot 0 is nobody's, as
    ReplaySSM wants it."""

    def __init__(self, state, u, k, g, committed, tables, sets, mixed):
        self.state, self.u, self.k, self.g = state, u, k, g
        self.committed, self.tables, self.sets = committed, tables, sets
        self.mixed = mixed

    @classmethod
    def of(
        cls,
        problem: Any,
        inputs: Inputs,
        ring: int,
        cumulative: bool = False,
    ) -> _State:
        import torch

        given = copy(inputs["state"])
        state = torch.cat([torch.zeros_like(given[:1]), given])
        P, device = len(state), state.device
        normal = functools.partial(
            torch.randn,
            device=device,
            generator=torch.Generator(device).manual_seed(0),
        )
        u = (0.1 * normal(P, problem.HV, ring, problem.V)).bfloat16()
        k = normal(P, problem.H, ring, problem.K)
        k = torch.nn.functional.normalize(k, dim=-1).bfloat16()
        g = -normal(P, problem.HV, ring).abs()
        g = g.cumsum(-1) if cumulative else g
        committed = torch.zeros(P, dtype=torch.int32, device=device)
        committed[1:] = torch.tensor(inputs["committed"], device=device)
        sets = [
            {name: copy(value) for name, value in zip(TOKENS, tokens, strict=True)}
            for tokens in inputs["sets"]
        ]
        mixed = [
            torch.cat([y[name].flatten(2) for name in ("q", "k", "v")], -1).flatten(
                0, 1
            )
            for y in sets
        ]
        tables = [copy(table) + 1 for table in inputs["tables"]]
        return cls(state, u, k, g, committed, tables, sets, mixed)


def _require_window(problem: Any) -> None:
    require(problem.R == WINDOW, f"is laid out for a window of {WINDOW} here")


VERIFY: dict[str, Callable[[Any, Inputs], Call]] = {
    "replayssm_verify": replayssm_verify,
    "flashinfer_ucache": flashinfer_ucache,
}
DECODE: dict[str, Callable[[Any, Inputs], Call]] = {"replayssm": replayssm}
