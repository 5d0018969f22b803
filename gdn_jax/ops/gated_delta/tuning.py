"""Launch configs as data: what was measured, and a heuristic where nothing was."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How `fused_update`'s kernel is cut up; see tile.py for what lanes hold.

    Attributes:
      block_v: rows of V in a tile, the part of a state held in registers at once.
      lanes_v: how many of them lie side by side across a warp's 32 lanes.
      tiles: tiles that a program takes one after another; the next one's load is in
        flight while one is worked on, and q, k and the gates are prepared once.
      num_warps: warps of a program.

    Pinning a config makes a row's bits independent of the rest of the batch.
    """

    block_v: int
    lanes_v: int
    tiles: int = 1
    num_warps: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive int; got {value!r}")
            if field.name != "tiles" and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two; got {value}")
        if self.lanes_v > min(self.block_v, 32):
            raise ValueError(
                f"lanes_v is a part of block_v and of a warp's 32 lanes; got "
                f"lanes_v={self.lanes_v}, block_v={self.block_v}"
            )


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A measured row. It serves calls of at most `heads` rows times value heads."""

    device_kind: str
    K: int
    V: int
    state_dtype: str
    single_token: bool
    heads: float
    config: LaunchConfig
    reason: str


TABLE: tuple[Tuned, ...] = ()


def find_config(
    device_kind: str, K: int, V: int, state_dtype, *, heads: int, single_token: bool
) -> LaunchConfig:
    """The tuned config of the smallest bucket that holds the call, or the heuristic.

    `heads` is rows times value heads; `single_token` is static: one token a row.
    """
    key = (device_kind, K, V, np.dtype(state_dtype).name, single_token)
    buckets = [
        row
        for row in TABLE
        if (row.device_kind, row.K, row.V, row.state_dtype, row.single_token) == key
        and heads <= row.heads
    ]
    if buckets:
        return min(buckets, key=lambda row: row.heads).config
    return heuristic(K, V)


def heuristic(K: int, V: int) -> LaunchConfig:
    """32 float32 values of state in a lane: what kept every device-independent bound
    (registers, no spills) and won or came close wherever it was measured."""
    padded = _next_power_of_2(K)
    block_v = max(1, min(1024 // padded, _next_power_of_2(V)))
    return LaunchConfig(block_v=block_v, lanes_v=min(4, block_v))


def interpreter(V: int) -> LaunchConfig:
    """One program for a whole head: the interpreter pays for every program."""
    block_v = _next_power_of_2(V)
    return LaunchConfig(block_v=block_v, lanes_v=min(4, block_v))


def _next_power_of_2(n: int) -> int:
    return 1 << math.ceil(math.log2(n))
