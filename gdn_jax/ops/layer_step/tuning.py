"""Launches of a layer's step."""

import dataclasses

from jax.experimental import pallas as pl

from gdn_jax._triton import check_launch
from gdn_jax.ops import checks
from gdn_jax.ops.gated_delta.tuning import LaunchConfig
from gdn_jax.ops.layer_step.call import Heads


@dataclasses.dataclass(frozen=True)
class LayerStepConfig:
    """How `fused_layer_step`'s kernel is cut up.

    Attributes:
      block_v, lanes_v, num_warps: of a tile, as in `LaunchConfig`. A program walks over
        tiles, the next of which is loaded while one is worked on.
      splits: programs that share out a value head's V. With more than one the norm, for
        which all of V is wanted, is a second launch, and each convolves q and k.
    """

    block_v: int
    lanes_v: int
    num_warps: int
    splits: int = 1

    def __post_init__(self):
        check_launch(self)
        _ = self.tile

    @property
    def tile(self) -> LaunchConfig:
        return LaunchConfig(self.block_v, self.lanes_v, 1, self.num_warps)

    def tiles(self, V: int) -> int:
        """That a program walks over."""
        return pl.cdiv(V, self.block_v * self.splits)

    def check(self, V: int) -> None:
        if self.splits > 1 and V % (self.block_v * self.splits):
            wanted = f"of which splits * block_v divide V = {V}, or splits = 1"
            remedy = "Programs that share out a head have as many rows each."
            checks.fail("config", self, wanted, remedy)


def heuristic(heads: Heads) -> LayerStepConfig:
    """A head's whole state at once where registers hold it, by eight warps."""
    V, K = pl.next_power_of_2(heads.V), pl.next_power_of_2(heads.K)
    block_v = min(V, 32 * 8 * 32 // K)
    warps = min(8, block_v)
    return LayerStepConfig(block_v, min(2, block_v // warps), warps)


def interpreter(heads: Heads) -> LayerStepConfig:
    """Few programs, for each of which the interpreter pays."""
    return LayerStepConfig(pl.next_power_of_2(heads.V), 1, 1)
