"""Launches of a layer's step as data, and where one kernel pays."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.tuning import MAX_HEAD_DIM, LaunchConfig


@dataclasses.dataclass(frozen=True)
class LayerStepConfig:
    """How `fused_layer_step`'s kernel is cut up.

    Attributes:
      block_v, lanes_v, num_warps: of a tile, as in `LaunchConfig`. A program walks over
        the tiles of a key head's value heads; the next one is loaded while one is
        worked on.
    """

    block_v: int
    lanes_v: int
    num_warps: int

    def __post_init__(self):
        _triton.check_launch(self)
        _ = self.tile

    @property
    def tile(self) -> LaunchConfig:
        return LaunchConfig(self.block_v, self.lanes_v, 1, self.num_warps)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a launch is chosen by.

    Attributes:
      rows: of the call.
      tokens: of each row; None where `cu_seqlens` says.
      columns: S, the tokens that the ring has room for.
      verifies: whether there is `num_accepted`.
      HV, K, V, state_dtype: of the pool.
    """

    rows: int
    tokens: int | None
    columns: int
    verifies: bool
    HV: int
    K: int
    V: int
    state_dtype: str

    def why_not(self) -> str | None:
        """Why the kernel cannot take the call, on any device; None where it can."""
        if max(self.K, self.V) <= MAX_HEAD_DIM:
            return None
        return f"K = {self.K}, V = {self.V}, of which it has registers for 256"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A measured row, of calls of at most so many tokens a row and `heads` rows times
    value heads. Without a config the ops one after another were faster."""

    K: int
    V: int
    state_dtype: str
    tokens: int
    heads: int
    config: LayerStepConfig | None
    reason: str


@functools.cache
def table(device_kind: str) -> tuple[Tuned, ...]:
    """What benchmarks/layer_step.py measured on a device, if it ever ran there."""
    name = device_kind.lower().replace(" ", "_")
    folder = importlib.resources.files("gdn_jax.ops.layer_step")
    file = folder / "tuned" / f"{name}.json"
    if not file.is_file():
        return ()
    return tuple(
        Tuned(**row | {"config": row["config"] and LayerStepConfig(**row["config"])})
        for row in json.loads(file.read_text())["rows"]
    )


def find_tuned(device_kind: str, step: Step) -> Tuned | None:
    """The row of the fewest tokens and the fewest heads that are as many, or of the
    most there are; None where the sizes were not measured."""
    dtype = "bfloat16" if step.state_dtype == "float16" else step.state_dtype
    sizes = (step.K, step.V, dtype)
    rows = [
        row for row in table(device_kind) if (row.K, row.V, row.state_dtype) == sizes
    ]
    if not rows:
        return None
    wanted = dict(tokens=step.tokens or step.columns, heads=step.rows * step.HV)
    for name, least in wanted.items():
        given = sorted({getattr(row, name) for row in rows})
        chosen = next((n for n in given if n >= least), given[-1])
        rows = [row for row in rows if getattr(row, name) == chosen]
    return rows[0]


def pays(implementation: str | None, arrays: Any, step: Step) -> bool:
    """Whether a layer takes the kernel: it can, and was measured to be faster. Rows of
    any length may be prompts, which were not."""
    if implementation in ("xla", "reference") or step.why_not() is not None:
        return False
    if step.tokens is None and not step.verifies:
        return False
    try:
        device_kind = _triton.device_kind(arrays)
    except NotImplementedError:
        return False
    tuned = find_tuned(device_kind, step)
    return tuned is not None and tuned.config is not None


def find_config(device_kind: str, step: Step) -> LayerStepConfig:
    tuned = find_tuned(device_kind, step)
    if tuned is None or tuned.config is None:
        return heuristic(step.K, step.V)
    return tuned.config


def heuristic(K: int, V: int) -> LayerStepConfig:
    """A head's whole state at once where registers hold it, by eight warps."""
    V, K = pl.next_power_of_2(V), pl.next_power_of_2(K)
    block_v = min(V, 32 * 8 * 32 // K)
    warps = min(8, block_v)
    return LayerStepConfig(block_v, min(2, block_v // warps), warps)


def interpreter(V: int) -> LayerStepConfig:
    """Few programs, for each of which the interpreter pays."""
    return LayerStepConfig(pl.next_power_of_2(V), 1, 1)
