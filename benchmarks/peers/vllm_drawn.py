"""vLLM 0.33's update on any call of `gdn_jax.testing.draws`.

What its kernel leaves undefined is said in words that it defines, so that no row is
left out: null rows and rows of a bad count name its null slot 0 (every slot lies one
higher there), `cu_seqlens` is clipped, tokens past the table have null columns, a row
that goes on from zeros finds zeros in its slot, and a row of many tokens with one slot
names that for each of them. What it does not write, the caller must not compare.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gdn_jax.testing.draws import Drawn, Shapes
from peers.call import Unavailable, load

if TYPE_CHECKING:
    from torch import Tensor


class Tables(NamedTuple):
    """As vLLM's kernel takes them."""

    slots: np.ndarray
    num_accepted: np.ndarray | None
    cu_seqlens: np.ndarray
    cleared: np.ndarray  # slots that must be zero beforehand


def tables_of(shapes: Shapes, drawn: Drawn) -> Tables:
    x, dead = shapes, drawn.read < 0
    own = drawn.tables.get("slots", np.arange(x.N)).astype(np.int64)
    is_slot = (own >= 0) & (own < x.P) & (own != x.null_slot)
    own = np.where(is_slot, own + 1, 0)
    own[dead] = 0
    accepted = None
    if x.slots == "checkpoints":
        accepted = np.where(dead, 1, drawn.tables["num_accepted"]).astype(np.int32)
        wide = np.zeros((x.N, max(x.S, x.longest)), np.int64)
        wide[:, : x.S] = own
        own = wide
    elif x.tokens != "single":
        own = np.repeat(own[:, None], x.longest, axis=1)
    bounds = drawn.tables.get("cu_seqlens")
    if bounds is None:
        bounds = np.arange(x.N + 1) * x.longest
    return Tables(
        own.astype(np.int32),
        accepted,
        np.clip(bounds, 0, x.L).astype(np.int32),
        drawn.read[drawn.fresh & ~dead] + 1,
    )


def tensor(array: np.ndarray, device: str) -> Tensor:
    """Of the same bits; NumPy's bfloat16 is none that torch knows."""
    import torch

    dtype = getattr(torch, array.dtype.name)
    bits = np.array(array).view(f"V{array.dtype.itemsize}")
    raw = torch.from_numpy(bits.view(f"i{array.dtype.itemsize}"))
    return raw.to(device).view(dtype)


def view(array: jax.Array) -> Tensor:
    """A JAX array as a torch tensor in the same memory: to read only."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def vllm_update(shapes: Shapes, drawn: Drawn, before: Tensor) -> tuple[Tensor, Tensor]:
    """(state, out) of vLLM's kernel: like `before`, the drawn pool, or with per-token
    states [L, HV, V, K]; and [L, HV, V]."""
    kernels = load("vllm.third_party.flash_linear_attention.ops.fused_sigmoid_gating")
    import torch

    x, device = shapes, str(before.device)
    tables = tables_of(x, drawn)
    state = torch.cat([torch.zeros_like(before[:1]), before])
    for slot in tables.cleared:
        state[int(slot)] = 0
    q, k, v, A_log, a, b, dt_bias = (tensor(y, device) for y in drawn.args[1:])
    q, k, v, a, b = (
        y.flatten(0, 1) if x.tokens == "dense" else y for y in (q, k, v, a, b)
    )
    options: dict[str, Any] = x.statics
    update = functools.partial(
        kernels.fused_sigmoid_gating_delta_rule_update,
        A_log=A_log,
        a=a,
        b=b,
        dt_bias=dt_bias,
        q=q[None],
        k=k[None],
        v=v[None],
        beta=options.get("softplus_beta", 1.0),
        threshold=options.get("softplus_threshold", 20.0),
        scale=options.get("scale"),
        initial_state=state,
        inplace_final_state=not x.per_token_states,
        cu_seqlens=tensor(tables.cu_seqlens, device),
        ssm_state_indices=tensor(tables.slots, device),
        num_accepted_tokens=(
            None if tables.num_accepted is None else tensor(tables.num_accepted, device)
        ),
        use_qk_l2norm_in_kernel=options.get("qk_l2norm", True),
        is_kda=x.kda,
    )
    try:
        out, new = update()
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        raise Unavailable(f"vLLM's kernel failed: {reason}") from error
    return new if x.per_token_states else new[1:], out[0]
