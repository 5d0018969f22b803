"""Launch configs as data: what was measured, and a heuristic where nothing was."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax._triton import check_launch
from gdn_jax.ops.blocks import padded

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


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """How `replay_update`'s kernels are cut up.

    Attributes:
      block_v, block_k: rows and columns of a state that are loaded at once, at least
        16. A program walks along V.
      steps_v: how many blocks of V a program walks over, the rest of V being others'.
      num_warps, num_stages: of that program; with two stages or more the next blocks
        are loaded while one is worked on.
      parts: into how many bfloat16 parts a float32 state is cut where it is read: 2
        leave an error of 2^-17, 3 float32's own.
      prepare_k, prepare_warps: columns of K that a program of the first kernel, which
        prepares a row's key head, loads at once, at least 16; and its warps.
    """

    block_v: int = 16
    block_k: int = 64
    steps_v: int = 8
    num_warps: int = 1
    num_stages: int = 3
    parts: int = 2
    prepare_k: int = 128
    prepare_warps: int = 1

    def __post_init__(self):
        check_launch(self, "steps_v", "num_stages", "parts")
        for name in ("block_v", "block_k", "prepare_k"):
            if not 16 <= getattr(self, name) <= 256:
                got = getattr(self, name)
                raise ValueError(f"{name} must be 16 to 256; got {got}")
        if self.parts not in (2, 3):
            raise ValueError(f"parts must be 2 or 3; got {self.parts}")

    def fitted(self, V: int, K: int) -> "ReplayConfig":
        """No larger than a state."""
        block_v = min(self.block_v, padded(V))
        return dataclasses.replace(
            self,
            block_v=block_v,
            block_k=min(self.block_k, padded(K)),
            prepare_k=min(self.prepare_k, padded(K)),
            steps_v=min(self.steps_v, pl.cdiv(V, block_v)),
        )

    def spans(self, V: int) -> int:
        """Programs that share out V."""
        return pl.cdiv(V, self.block_v * self.steps_v)

    def parts_of(self, dtype: Any) -> int:
        """Of a state of that dtype; two hold all of a float16."""
        return self.parts if dtype == jnp.float32 else 2


def replay_heuristic(tokens: int, keys: Any, state: Any) -> ReplayConfig:
    """For rows of at most so many tokens, and keys and states of these dtypes.

    What benchmarks/replay.py found fastest on an H200 with K = V = 128, HV = 2 H, R =
    16, bfloat16 keys and 1, 4 and 8 tokens, of what spills no registers; all others
    were chosen by what fits. Of float32 keys and more than 16 tokens everything spills
    some. With up to 8 tokens a program is one warp, which waits for no other. Blocks
    are narrow, so that many programs fit a multiprocessor, where a state of 16 bits
    leaves room for wider ones and one more stage. The first kernel waits for memory
    alone: it asks for all of K at once.
    """
    wide = functools.partial(ReplayConfig, num_warps=4, num_stages=1)
    if jnp.dtype(keys).itemsize > 2:
        return wide(32, 16, 4, prepare_k=32, prepare_warps=8)
    if tokens > 16:
        return wide(16, 32, 8, prepare_k=32, prepare_warps=8)
    if tokens > 8:
        return wide(32, 32, 4, prepare_k=16, prepare_warps=4)
    narrow = jnp.dtype(state).itemsize > 2
    if tokens > 4:
        return ReplayConfig(16, 32, 8) if narrow else ReplayConfig(32, 64, 4, 2, 2)
    if tokens > 1:
        return ReplayConfig(16, 32, 4, 1, 2) if narrow else ReplayConfig(16, 64, 4)
    return ReplayConfig(32, 64, 4, 2, 2) if narrow else ReplayConfig(16, 64, 8)


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


@dataclasses.dataclass(frozen=True)
class Crossover:
    """From so many rows times value heads on, `replay_update` was faster than
    `fused_update`, which writes a state for each of a row's `tokens`; `group` is HV /
    H. None where it never was."""

    K: int
    V: int
    group: int
    tokens: int
    state_dtype: str
    heads: int | None
    reason: str


def _read(device_kind: str) -> dict[str, Any]:
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
        for run in _read(device_kind).get("runs", ())
        for row in run["rows"]
    )


@functools.cache
def crossovers(device_kind: str) -> tuple[Crossover, ...]:
    """What benchmarks/crossover.py measured, by growing `tokens`."""
    return tuple(
        Crossover(**row) for row in _read(device_kind).get("replay", {}).get("rows", ())
    )


def replay_pays(
    device_kind: str, tokens: int, state: Any, num_key_heads: int, rows: int
) -> bool:
    """Whether replay was faster for so many rows of `state` [P HV V K], by the row of
    the most tokens that are not more: the more tokens, the sooner it is. Not where
    nothing was measured."""
    HV, V, K = state.shape[1:]
    name = state.dtype.name
    name = "bfloat16" if name == "float16" else name
    wanted = (K, V, HV // num_key_heads, name)
    found = [
        row
        for row in crossovers(device_kind)
        if (row.K, row.V, row.group, row.state_dtype) == wanted and row.tokens <= tokens
    ]
    if not found:
        return False
    least = max(found, key=lambda row: row.tokens).heads
    return least is not None and rows * HV >= least


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
