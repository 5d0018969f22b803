"""Launches of a layer's step as data, and where one kernel pays."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.replay_state import WINDOWS
from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig, replay_heuristic
from gdn_jax.ops.gated_delta.tuning import MAX_HEAD_DIM, LaunchConfig, check_tile

MAX_TOKENS = 9  # of a row: a step with eight drafts
MOST_OF_EIGHT_WARPS = 7  # tokens: with more, half a head of 128 spills on an H200
# Tokens: with more, or where rows are packed, the launches that `replay_update` takes
# spill here, beside gate and bounds; that of the most tokens does not.
MOST_OF_REPLAYS_OWN = 8
# conv.py's Ring counts a row's programs by 2**20s in the int32 `start`: up to 2**11
MEASURED_WINDOW = WINDOWS[0]
MAX_HEADS, MAX_PROGRAMS = 255, 8


@dataclasses.dataclass(frozen=True)
class LayerStepConfig:
    """How `fused_layer_step`'s kernel is cut up.

    Attributes:
      block_v, lanes_v, num_warps: of a tile, as in `LaunchConfig`. A program walks over
        tiles of a value head; the next one is loaded while one is worked on.
      programs: that share out a value head's V. With more than one the norm, which
        needs all of it, is a launch of its own.
    """

    block_v: int
    lanes_v: int
    num_warps: int
    programs: int = 1

    def __post_init__(self):
        _triton.check_launch(self)
        check_tile(self)
        if self.programs > MAX_PROGRAMS:
            raise ValueError(
                f"programs must be at most {MAX_PROGRAMS}, more of a head than which a "
                f"slot's start does not count; got {self.programs}."
            )

    def tiles(self, V: int) -> int:
        """Of a program."""
        return pl.cdiv(V, self.block_v * self.programs)

    def tile(self, V: int) -> LaunchConfig:
        """As `Tile` takes it: so many tiles cover V, and may reach past its end."""
        tiles = self.tiles(V) * self.programs
        return LaunchConfig(self.block_v, self.lanes_v, tiles, self.num_warps)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a launch is chosen by.

    Attributes:
      rows: of the call.
      tokens: of each row; None where `cu_seqlens` says.
      columns: S, the tokens that the ring has room for.
      verifies: whether there is `num_accepted`.
      H, HV, K, V, state_dtype: of the state.
      replay: whether that is a `ReplayState`.
      act_dtype: of the projections.
      window: R of a `ReplayState`.
    """

    rows: int
    tokens: int | None
    columns: int
    verifies: bool
    H: int
    HV: int
    K: int
    V: int
    state_dtype: str
    replay: bool = False
    act_dtype: str = "bfloat16"
    window: int = MEASURED_WINDOW

    def is_like_measured(self) -> bool:
        """But for its sizes: of projections and records of 16 bits."""
        is_short = jnp.dtype(self.act_dtype).itemsize == 2
        return is_short and (not self.replay or self.window == MEASURED_WINDOW)

    def why_not(self) -> str | None:
        """Why the kernel cannot take the call, on any device; None where it can."""
        if max(self.K, self.V) > MAX_HEAD_DIM:
            return f"K = {self.K}, V = {self.V}, of which it has registers for 256"
        if (self.tokens or self.columns) > MAX_TOKENS:
            count = self.tokens or self.columns
            return f"{count} tokens a row, of which it has registers for {MAX_TOKENS}"
        if self.HV > MAX_HEADS and not self.replay:
            return f"HV = {self.HV}, of which `start` can count {MAX_HEADS}"
        return None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A measured row, of calls of at most so many tokens a row (where there are more
    than one they verify) and `programs` rows times value heads.

    Attributes:
      group: value heads of a key head.
      config: the fastest launch; of replay a `ReplayConfig`.
      pays: whether it was faster than the ops one after another.
    """

    K: int
    V: int
    state_dtype: str
    group: int
    tokens: int
    programs: int
    config: LayerStepConfig | ReplayConfig
    pays: bool
    reason: str
    replay: bool = False


@functools.cache
def table(device_kind: str) -> tuple[Tuned, ...]:
    """What benchmarks/layer_step_tune.py measured on a device, if it ran there."""
    name = device_kind.lower().replace(" ", "_")
    folder = importlib.resources.files("gdn_jax.ops.layer_step")
    file = folder / "tuned" / f"{name}.json"
    if not file.is_file():
        return ()
    names = {field.name for field in dataclasses.fields(Tuned)}

    def tuned(row: dict[str, Any]) -> Tuned:
        """Without the commit that a row may be of."""
        fields: dict[str, Any] = {name: row[name] for name in names & row.keys()}
        kind = ReplayConfig if row.get("replay") else LayerStepConfig
        fields["config"] = kind(**row["config"])
        return Tuned(**fields)

    return tuple(map(tuned, json.loads(file.read_text())["rows"]))


def find_tuned(device_kind: str, step: Step) -> Tuned | None:
    """The row of the fewest tokens that are as many, and of those the one of the fewest
    programs that are as many, or of the most there are. None where nothing like it, or
    no rows of so many tokens, were measured."""
    if not step.is_like_measured():
        return None
    dtype = "bfloat16" if step.state_dtype == "float16" else step.state_dtype
    sizes = step.K, step.V, dtype, step.HV // step.H, step.replay
    tokens = step.tokens or step.columns
    rows = [
        row
        for row in table(device_kind)
        if (row.K, row.V, row.state_dtype, row.group, row.replay) == sizes
        and row.tokens >= tokens
    ]
    if not rows:
        return None
    fewest = min(row.tokens for row in rows)
    rows = sorted(
        (row for row in rows if row.tokens == fewest), key=lambda row: row.programs
    )
    programs = step.rows * step.HV
    return next((row for row in rows if programs <= row.programs), rows[-1])


def pays(implementation: str | None, arrays: Any, step: Step) -> bool:
    """Whether a layer takes the kernel: it can, and was measured to be faster. More
    tokens than one that do not verify, or rows of any length, may be prompts."""
    if implementation in ("xla", "reference") or step.why_not() is not None:
        return False
    if step.tokens is None or step.tokens > step.columns:
        return False
    if step.tokens > 1 and not step.verifies:
        return False
    try:
        device_kind = _triton.device_kind(arrays)
    except NotImplementedError:
        return False
    tuned = find_tuned(device_kind, step)
    return tuned is not None and tuned.pays


def find_config(device_kind: str, step: Step) -> Any:
    tuned = find_tuned(device_kind, step)
    of_any_length = step.replay and step.tokens is None
    if tuned is not None and not of_any_length:
        return tuned.config
    if step.replay:
        most = step.tokens or WINDOWS[-1]
        if most > MOST_OF_REPLAYS_OWN:
            most = WINDOWS[-1]
        dtypes, group = (step.act_dtype, step.state_dtype), step.HV // step.H
        return replay_heuristic(most, *dtypes, group)
    return heuristic(step.K, step.V, step.tokens or step.columns)


def heuristic(K: int, V: int, tokens: int) -> LayerStepConfig:
    """What registers hold, also of float32 tokens, but for some bytes of several where
    K is small beside V, or both are above 128. With one token a program has all of a
    head of 128 and walks over it. More tokens want registers too: it has half of the
    head, or a quarter, and loads that at once: whole heads, by 16 warps, took longer to
    verify 4 tokens in all that was measured on an H200."""
    V, K = pl.next_power_of_2(V), pl.next_power_of_2(K)
    many = tokens > MOST_OF_EIGHT_WARPS
    values = 2**14 if tokens == 1 else 2**12 if many else 2**13  # of a program
    programs = min(MAX_PROGRAMS, max(1, V * K // values))
    rows = V // programs
    warps = min(16 if many else 8, rows)
    block_v = max(warps, min(rows, 32 * 32 * warps // K))
    # 8 of K to a lane: the fewer it had, the more of V would it have for every token
    lanes_v = min(32, max(2, 256 // K), block_v // warps)
    return LayerStepConfig(block_v, lanes_v, warps, programs)


def interpreter(V: int) -> LayerStepConfig:
    """Few programs, for each of which the interpreter pays."""
    return LayerStepConfig(pl.next_power_of_2(V), 1, 1)
