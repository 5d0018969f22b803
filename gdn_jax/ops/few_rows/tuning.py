"""How products of few rows are cut up."""

import dataclasses

from jax.experimental import pallas as pl

from gdn_jax._triton import check_launch
from gdn_jax.ops.blocks import MIN_DOT, padded

MAX_ROWS = 128  # from where on XLA's products are as fast
MAX_BLOCK = 256
# An H100 has 132 SMs; parts of a sum cost more than a quarter of them idle.
FEWEST_PROGRAMS = 92
# With many rows narrow tiles cost a third more, as much as half of the SMs.
MANY_ROWS, FEWEST_OF_MANY_ROWS = 64, 64
FEWEST_STEPS = 4  # of a program, to have loads on their way
MAX_SPLITS = 8


@dataclasses.dataclass(frozen=True)
class FewRowsConfig:
    """How the kernel is cut up.

    Attributes:
      block_f: columns of a program.
      block_d: values that are summed in one step.
      splits: programs that share the sum of a column; more than one leave float32
        parts, which whatever follows adds up.
      num_warps: of a program.
      num_stages: steps whose operands are on their way to shared memory at once.
    """

    block_f: int
    block_d: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self):
        check_launch(self, "num_stages")
        for name in ("block_f", "block_d"):
            size = getattr(self, name)
            if not MIN_DOT <= size <= MAX_BLOCK:
                raise ValueError(f"{name} must be {MIN_DOT} to {MAX_BLOCK}; got {size}")


# 8 KB and 16 KB of a matrix a step, 40 KB to 64 KB on their way in an SM, where 26 KB
# cover the latency of 4.3 TB/s. x is read by every program, as much again as 64 columns
# of a matrix where rows are 64: so rather wide tiles, if they are enough for the SMs.
WIDE = FewRowsConfig(128, 64, num_stages=5)
NARROW = FewRowsConfig(64, 64, num_stages=6)
# Of gate and up each; the sums of both are a program's.
GATED_WIDE = FewRowsConfig(128, 64, num_warps=8)
GATED_NARROW = FewRowsConfig(64, 64)


def shared_memory(config: FewRowsConfig, num_rows: int, *, gated: bool) -> float:
    """KB of operands of two bytes on their way, in one buffer fewer than stages."""
    columns = config.block_f * (2 if gated else 1)
    operands = config.block_d * (columns + padded(num_rows))
    return 2 * operands * (config.num_stages - 1) / 1024


def heuristic(
    num_rows: int, D: int, columns: tuple[int, ...], room: int, *, gated: bool
) -> FewRowsConfig:
    """Of matrices [D, columns], in so many KB of shared memory."""
    config = _launch(num_rows, D, columns, gated=gated)
    while shared_memory(config, num_rows, gated=gated) > room:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def _launch(
    num_rows: int, D: int, columns: tuple[int, ...], *, gated: bool
) -> FewRowsConfig:

    def tiles(config: FewRowsConfig) -> int:
        return sum(pl.cdiv(F, config.block_f) for F in columns[: 1 if gated else None])

    wide, narrow = (GATED_WIDE, GATED_NARROW) if gated else (WIDE, NARROW)
    if tiles(wide) >= (
        FEWEST_OF_MANY_ROWS if num_rows > MANY_ROWS else FEWEST_PROGRAMS
    ):
        return wide
    splits = 1
    while (
        not gated
        and tiles(narrow) * splits < FEWEST_PROGRAMS
        and splits < MAX_SPLITS
        and 2 * splits * FEWEST_STEPS * narrow.block_d <= D
    ):
        splits *= 2
    return dataclasses.replace(narrow, splits=splits)
