"""Launch configs as data: what was measured, and a heuristic where nothing was."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Literal

import numpy as np
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax._triton import check_launch

MAX_HEAD_DIM = 256  # of K and V: what fits a program
MAX_VALUES_IN_A_LANE = 128  # beyond, registers spill and compiling takes minutes
GROUP = 4  # tokens whose gates are found at once: those that verify three drafts


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How `fused_update`'s kernel is cut up; see tile.py for what lanes hold.

    Attributes:
      block_v: rows of V in a tile, the part of a state worked on at once.
      lanes_v: how many of them lie side by side across a warp's 32 lanes.
      tiles: tiles of a program, loaded together and worked on one after another; with
        one token a row, q, k and the gates are prepared once for all of them.
      num_warps: warps of a program; they share out a tile's rows.

    Pinning a config makes a row's bits independent of the rest of the batch.
    """

    block_v: int
    lanes_v: int
    tiles: int = 1
    num_warps: int = 1

    def __post_init__(self):
        check_launch(self, "tiles")
        check_tile(self)


def check_tile(config: Any) -> None:
    if config.lanes_v > 32 or config.lanes_v * config.num_warps > config.block_v:
        raise ValueError(
            f"every warp has lanes_v <= 32 rows of block_v; got {config}. Take "
            f"block_v >= lanes_v * num_warps."
        )


def check_registers(config: Any, K: int, tiles: int = 1) -> None:
    """Whether a lane can hold its values of so many tiles."""
    lanes = _triton.LANES * config.num_warps
    values = tiles * config.block_v * pl.next_power_of_2(K) // lanes
    if values > MAX_VALUES_IN_A_LANE:
        raise ValueError(
            f"config must leave at most {MAX_VALUES_IN_A_LANE} values of state to a "
            f"lane; got {config}, {values} at {K=}. Take a smaller block_v, or more "
            f"warps."
        )


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How `chunk_update`'s kernels are cut up.

    Attributes:
      block_v: rows of V that a program carries along a row's chunks, at least 16.
      num_warps: of that program.
      num_stages: of that program; with three a chunk is loaded while the one before is
        worked on, with two between them.
      prepare_warps: of a program that prepares a chunk.
    """

    block_v: int = 32
    num_warps: int = 4
    num_stages: int = 3
    prepare_warps: int = 4

    def __post_init__(self):
        check_launch(self, "num_stages")
        if not 16 <= self.block_v <= 256:
            raise ValueError(f"block_v must be 16 to 256; got {self.block_v}")
        if self.num_warps > self.block_v:
            raise ValueError(f"num_warps must be at most block_v; got {self}")

    @property
    def clearing(self) -> LaunchConfig:
        """The tiles in which tokens of no row are cleared."""
        lanes_v = max(1, min(2, self.block_v // self.num_warps))
        return LaunchConfig(self.block_v, lanes_v, 1, self.num_warps)


def chunk_heuristic(K: int, key_parts: int, solved_parts: int) -> ChunkConfig:
    """The widest tile and the most stages that fit registers and shared memory; with
    keys longer than 128 the forward pass spills registers, of float32 ones many.

    On an H200, 1x8192 tokens in bfloat16 with K = V = 128, other launches were slower:
    2 stages, 16 rows, more warps (they share out a product's columns), and 8 warps to
    prepare. Other sizes were chosen by what fits alone.
    """
    padded = max(16, pl.next_power_of_2(K))
    loaded = 256 * padded * key_parts + 16384 * solved_parts  # bytes a chunk
    stages = 3 if loaded <= 65536 else 2 if loaded <= 98304 else 1
    if key_parts == 1 and padded == K and stages == 3:
        return ChunkConfig()
    wide = K > 128 or (key_parts > 1 and K > 64)
    return ChunkConfig(16, num_warps=8 if wide else 4, num_stages=stages)


Walk = Literal["one", "few", "any"]


def find_walk(tokens_per_row: int | None, per_k: bool) -> Walk:
    """How the kernel goes over a row's tokens: one without a loop, a group of them
    whose gates are found at once, or group by group where the host does not know how
    many there are, or they are more. Decays of each K (`per_k`) are found one token
    after another."""
    if tokens_per_row == 1:
        return "one"
    if tokens_per_row is None or tokens_per_row > GROUP or per_k:
        return "any"
    return "few"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A measured row. It serves calls of at most `heads` rows times value heads."""

    K: int
    V: int
    state_dtype: str
    walk: Walk
    heads: int
    config: LaunchConfig
    reason: str


def read(device_kind: str) -> dict[str, Any]:
    name = device_kind.lower().replace(" ", "_")
    file = (
        importlib.resources.files("gdn_jax.ops.gated_delta") / "tuned" / f"{name}.json"
    )
    return json.loads(file.read_text()) if file.is_file() else {}


@functools.cache
def table(device_kind: str) -> tuple[Tuned, ...]:
    """What benchmarks/tune.py measured on a device; nothing where it never ran."""
    return tuple(
        Tuned(**row | {"config": LaunchConfig(**row["config"])})
        for run in read(device_kind).get("runs", ())
        for row in run["rows"]
    )


def find_config(
    device_kind: str, K: int, V: int, state_dtype, *, heads: int, walk: Walk
) -> LaunchConfig:
    """The tuned config of the smallest bucket that holds the call, past the last bucket
    the last one's; the heuristic for a device or a shape that was never measured.

    `heads` is rows times value heads (under vmap those of one call). float16 takes
    bfloat16's rows: what counts is the size. Where few tokens were not measured they
    take the rows of any number.
    """
    name = np.dtype(state_dtype).name
    shape = (K, V, "bfloat16" if name == "float16" else name)
    measured = [
        row for row in table(device_kind) if (row.K, row.V, row.state_dtype) == shape
    ]
    rows = [row for row in measured if row.walk == walk]
    if not rows and walk == "few":
        rows = [row for row in measured if row.walk == "any"]
    rows.sort(key=lambda row: row.heads)
    if not rows:
        return heuristic(K, V)
    return next((row for row in rows if heads <= row.heads), rows[-1]).config


def heuristic(K: int, V: int) -> LaunchConfig:
    """Up to 32 float32 values of state in a lane, one tile a program: no spills at any
    size, and near the best wherever it was measured (see the reasons in tuned/)."""
    padded = pl.next_power_of_2(K)
    block_v = max(1, min(1024 // padded, pl.next_power_of_2(V)))
    return LaunchConfig(block_v=block_v, lanes_v=min(2, block_v))


def interpreter(V: int) -> LaunchConfig:
    """One program for a whole head: the interpreter pays for every program, and for
    every value that K is cut into."""
    return LaunchConfig(block_v=pl.next_power_of_2(V), lanes_v=1)
