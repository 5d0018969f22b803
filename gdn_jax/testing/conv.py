"""Calls of `causal_conv1d`: the table of cases, inputs for one, and its oracle."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdn_jax.ops.causal_conv1d.call import ConvState


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """One call of `causal_conv1d`, in the words of `Case`.

    Attributes:
      tokens: "dense" [N, T, C], "packed" [L, C] with `cu_seqlens`, or "single" [L, C]
        without, one token a row.
      columns: S, the ring's columns past the history.
      speculative: with `num_accepted`.
      slots: states lie in slots of a pool; else one a row.
    """

    name: str
    lengths: tuple[int, ...]
    tokens: str = "dense"
    width: int = 4
    columns: int = 1
    speculative: bool = False
    slots: bool = True
    null_rows: tuple[int, ...] = ()
    bad_accepted: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    padding: int = 0
    bias: bool = False
    activation: str | None = "silu"
    dtype: str = "float32"

    @property
    def dead(self) -> set[int]:
        empty = {n for n, length in enumerate(self.lengths) if length == 0}
        return empty | set(self.null_rows) | set(self.bad_accepted)


def make_conv(
    case: ConvCase, C: int = 6, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `causal_conv1d` for a case, as NumPy arrays; whatever must not be
    read is NaN."""
    random = np.random.default_rng(seed)
    N, ring = len(case.lengths), case.width - 1 + case.columns
    P = 2 * N + 3 if case.slots else N
    slots = (random.permutation(P) if case.slots else np.arange(P))[:N].astype(np.int32)
    start = random.integers(0, ring, P).astype(np.int32)
    accepted = random.integers(1, case.columns + 1, N).astype(np.int32)
    buffer = np.full((P, C, ring), np.nan)
    for n in set(range(N)) - case.dead - set(case.fresh):
        first = start[slots[n]] + (accepted[n] - 1 if case.speculative else 0)
        columns = (first + np.arange(case.width - 1)) % ring
        buffer[slots[n]][:, columns] = random.standard_normal((C, case.width - 1))
    for i, n in enumerate(case.null_rows):
        slots[n] = (-1, P, P + 7)[i % 3]
    begin = np.concatenate([[0], np.cumsum(case.lengths)]).astype(np.int32)
    x = random.standard_normal((begin[-1] + case.padding, C))
    x[begin[-1] :] = np.nan
    for n in case.dead:
        x[begin[n] : begin[n + 1]] = np.nan
    kwargs: dict[str, Any] = {"activation": case.activation}
    if case.slots:
        kwargs["slots"] = slots
    if case.tokens == "packed":
        kwargs["cu_seqlens"] = begin
    elif case.tokens == "dense":
        x = x.reshape(N, -1, C)
    if case.speculative:
        for i, n in enumerate(case.bad_accepted):
            accepted[n] = (0, case.columns + 1)[i % 2]
        kwargs["num_accepted"] = accepted
    if case.fresh:
        kwargs["has_state"] = np.array([n not in case.fresh for n in range(N)])
    if case.bias:
        kwargs["bias"] = random.standard_normal(C).astype(np.float32)
    dtype = jnp.dtype(case.dtype)
    state = ConvState(buffer.astype(dtype), start)  # pyright: ignore[reportArgumentType]
    weight = random.standard_normal((C, case.width)).astype(np.float32)
    return (state, x.astype(dtype), weight), kwargs


def conv_oracle(
    case: ConvCase, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[np.ndarray, dict[int, list[np.ndarray]]]:
    """(y, histories) in float64: of each slot that a live row owns, the last inputs
    [C, W - 1] after the step; with num_accepted those of each count that may follow."""
    (buffer, start), x, weight = args
    C, W = weight.shape
    buffer, x, weight = (z.astype(np.float64) for z in (buffer, x, weight))
    x, ring = x.reshape(-1, C), buffer.shape[2]
    y, histories = np.zeros_like(x), {}
    begin = np.concatenate([[0], np.cumsum(case.lengths)])
    for n, length in enumerate(case.lengths):
        if n in case.dead:
            continue
        slot = kwargs["slots"][n] if case.slots else n
        first = start[slot] + (kwargs["num_accepted"][n] - 1 if case.speculative else 0)
        past = buffer[slot][:, (first + np.arange(W - 1)) % ring].T
        past = np.zeros((W - 1, C)) if n in case.fresh else past
        seen = np.concatenate([past, x[begin[n] : begin[n + 1]]])
        for t in range(length):
            total = np.sum(seen[t : t + W].T * weight, axis=1) + kwargs.get("bias", 0)
            silu = case.activation == "silu"
            y[begin[n] + t] = total / (1 + np.exp(-total)) if silu else total
        kept = min(length, case.columns)
        stands = range(1, kept + 1) if case.speculative else [length]
        histories[int(slot)] = [seen[count : count + W - 1].T for count in stands]
    return y, histories


CONV_CASES = (
    ConvCase("decode", (1,) * 3),
    ConvCase("decode, packed", (1,) * 3, tokens="single", bias=True),
    ConvCase("decode, nulls", (1,) * 4, null_rows=(0, 3), fresh=(1,)),
    ConvCase("decode, bfloat16", (1,) * 3, dtype="bfloat16"),
    ConvCase("decode, state per row", (1,) * 2, slots=False),
    ConvCase("decode, no activation", (1,) * 2, activation=None, bias=True),
    ConvCase("decode, width 2", (1,) * 2, width=2),
    ConvCase("decode, width 1", (1,) * 2, width=1),
    ConvCase("decode, float16, width 5", (1,) * 2, width=5, dtype="float16"),
    ConvCase("dense, T=2", (2,) * 3, fresh=(0,)),
    ConvCase("dense, T=9, wide ring", (9,) * 2, columns=4),
    ConvCase("packed", (3, 0, 17, 1, 2), tokens="packed", null_rows=(3,), padding=4),
    ConvCase("packed, fresh", (2, 5, 1), tokens="packed", fresh=(0, 2), slots=False),
    ConvCase("verify", (4,) * 3, columns=4, speculative=True),
    ConvCase("verify, width 1", (3,) * 2, width=1, columns=3, speculative=True),
    ConvCase(
        "verify, width 2", (2,) * 2, width=2, columns=3, speculative=True, bias=True
    ),
    ConvCase("verify, T=2 of 4", (2,) * 3, columns=4, speculative=True, fresh=(1,)),
    ConvCase(
        "verify, packed",
        (4, 1, 0, 3, 6, 2, 2),
        tokens="packed",
        columns=4,
        speculative=True,
        null_rows=(1,),
        bad_accepted=(5, 6),
        padding=3,
    ),
)
