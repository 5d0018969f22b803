"""How attention to a cache is cut up."""

import dataclasses

from jax.experimental import pallas as pl

from gdn_jax._triton import check_launch
from gdn_jax.ops.blocks import MIN_DOT

# Queries of one key head in a call: more are prefill, whose products XLA does better.
MAX_QUERIES = 64
PROGRAMS = 128  # about as many as an H100 has SMs


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How the kernel is cut up.

    Attributes:
      splits: programs that share the positions of one sequence and key head.
      block_m: positions of one step.
      num_warps: of a program.
      num_stages: steps whose keys and values are on their way at once.
    """

    splits: int
    block_m: int = 32
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        check_launch(self, "num_stages")
        if self.block_m < MIN_DOT:
            raise ValueError(f"block_m must be {MIN_DOT} or more; got {self.block_m}")


def heuristic(num_rows: int, num_kv_heads: int, num_positions: int) -> AttentionConfig:
    """As many programs as fill the GPU, each with a step of its own at least."""
    wanted = pl.next_power_of_2(pl.cdiv(PROGRAMS, num_rows * num_kv_heads))
    config = AttentionConfig(1)
    most = pl.next_power_of_2(pl.cdiv(num_positions, config.block_m))
    return dataclasses.replace(config, splits=min(wanted, most))
