"""Launch sizes of replay's kernels as data, and where replay pays."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax._triton import check_launch
from gdn_jax.ops.blocks import padded
from gdn_jax.ops.gated_delta import tuning

MAX_SYSTEM_VALUES_IN_A_LANE = 16  # of each of several arrays


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
                raise ValueError(
                    f"{name} must be 16 to 256, which a product takes; got {got}."
                )
        if self.parts not in (2, 3):
            raise ValueError(
                f"parts must be 2 or 3; got {self.parts}. Take 3 for float32's own "
                f"error."
            )

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


def check_replay_registers(config: ReplayConfig, K: int, V: int) -> None:
    """Whether a lane can hold its values of a block of a state."""
    of_state = config.fitted(V, K)
    values = of_state.block_v * of_state.block_k // (_triton.LANES * config.num_warps)
    if values > tuning.MAX_VALUES_IN_A_LANE:
        raise ValueError(
            f"config must leave at most {tuning.MAX_VALUES_IN_A_LANE} values of state "
            f"to a lane; got {config}, {values} at {K=}, {V=}. Take a smaller block_v "
            f"or block_k, or more warps."
        )


def replay_heuristic(tokens: int, keys: Any, state: Any, group: int) -> ReplayConfig:
    """For rows of at most so many tokens, keys and states of these dtypes, and so many
    value heads of a key head.

    What benchmarks/replay.py found fastest on an H200 with K = V = 128, HV = 2 H, R =
    16, bfloat16 keys and 1, 4 and 8 tokens, of what spills no registers; all others
    were chosen by what fits. Of float32 keys and more than 16 tokens everything spills
    some. With up to 8 tokens a program is one warp, which waits for no other. Blocks
    are narrow, so that many programs fit a multiprocessor, where a state of 16 bits
    leaves room for wider ones and one more stage. The first kernel waits for memory
    alone: it asks for all of K at once; where many value heads share a key head it has
    a system of equations for each, and more warps.
    """
    config = _of_two_heads(tokens, keys, state)
    columns = pl.next_power_of_2(2 * tokens)
    systems = pl.next_power_of_2(group) * columns * columns
    lanes = _triton.LANES * MAX_SYSTEM_VALUES_IN_A_LANE
    warps = min(8, max(config.prepare_warps, systems // lanes))
    return dataclasses.replace(config, prepare_warps=warps)


def _of_two_heads(tokens: int, keys: Any, state: Any) -> ReplayConfig:
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


@functools.cache
def crossovers(device_kind: str) -> tuple[Crossover, ...]:
    """What benchmarks/crossover.py measured, by growing `tokens`; without the commits
    that rows may be of."""
    names = [field.name for field in dataclasses.fields(Crossover)]
    rows = tuning.read(device_kind).get("replay", {}).get("rows", ())
    return tuple(Crossover(**{name: row[name] for name in names}) for row in rows)


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
