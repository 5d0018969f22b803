"""How the grouped product's kernels are cut up."""

import dataclasses

from gdn_jax._triton import check_launch
from gdn_jax.ops.blocks import MIN_DOT, padded

MAX_BLOCK = 256
NARROW = 2  # bytes of a value that tensor cores take as it is


@dataclasses.dataclass(frozen=True)
class GroupedDotConfig:
    """How `grouped_dot`'s kernel is cut up.

    Attributes:
      block_l: rows of a program, all of one group.
      block_f: of their columns in y, those of a program.
      block_d: values that are summed in one step.
      num_warps: of a program.
      num_stages: steps whose operands are on their way to shared memory at once.
    """

    block_l: int
    block_f: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self):
        check_launch(self, "num_stages")
        for name in ("block_l", "block_f", "block_d"):
            size = getattr(self, name)
            if not MIN_DOT <= size <= MAX_BLOCK:
                raise ValueError(f"{name} must be {MIN_DOT} to {MAX_BLOCK}; got {size}")


# (rows of a group, at most; launch), reasoned and compiled for an H200, not measured.
LAUNCHES = (
    # Decoding reads weights and little else. 16 KB of them a step in three buffers are
    # 48 KB on their way, and shared memory has room for three programs an SM; 26 KB
    # would cover the latency of 4.3 TB/s. Narrow tiles, because one token's 10 experts
    # make few of them; 128 bytes of a row, because DRAM is slower with shorter ones.
    (16, GroupedDotConfig(16, 64, 128)),
    # Still weights above all. Twice the columns halve how often x is read again.
    (32, GroupedDotConfig(32, 128, 64)),
    # 64 rows are what a warpgroup's product needs.
    (64, GroupedDotConfig(64, 128, 64)),
    # 32 KB of operands a step feed 128 x 128 sums; with 3 stages an SM has 2 programs.
    (None, GroupedDotConfig(128, 128, 64, num_warps=8, num_stages=3)),
)
# A float32 value takes part in up to six products of bfloat16 parts, which have to be
# held in registers.
WIDE = GroupedDotConfig(16, 64, 32, num_stages=2)
# Of the gradient of weights, whose rows are summed and whose D are a program's too.
OUTER = GroupedDotConfig(32, 128, 128, num_warps=8, num_stages=3)
OUTER_WIDE = GroupedDotConfig(16, 64, 32, num_stages=2)


def heuristic(
    num_rows: int, num_groups: int, D: int, F: int, itemsize: int
) -> GroupedDotConfig:
    """Of `num_rows` in groups of one size, each as long as D and multiplied to F;
    `itemsize` is that of the wider operand."""
    mean = -(-num_rows // min(num_groups, num_rows))
    launch = WIDE
    if itemsize <= NARROW:
        launch = next(x for most, x in LAUNCHES if most is None or mean <= most)
    return _fit(launch, D, F)


def outer_heuristic(D: int, F: int, itemsize: int) -> GroupedDotConfig:
    return _fit(OUTER if itemsize <= NARROW else OUTER_WIDE, D, F)


def _fit(launch: GroupedDotConfig, D: int, F: int) -> GroupedDotConfig:
    return dataclasses.replace(
        launch,
        block_f=min(launch.block_f, padded(F)),
        block_d=min(launch.block_d, padded(D)),
    )
