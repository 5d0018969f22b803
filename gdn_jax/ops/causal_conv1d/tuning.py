"""How the convolution's kernel is cut up."""

import dataclasses

from jax.experimental import pallas as pl

from gdn_jax._triton import LANES, check_launch

LOAD_BYTES = 16
AHEAD = 8
# Of an H200's 132 cores each then has 16 warps, which keep enough loads in flight.
ENOUGH_WARPS = 2048
ENOUGH_PROGRAMS = 256
# A program's filter, and the inputs before its tokens, are then few beside them.
LONG_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """How `causal_conv1d`'s kernel is cut up: what a program takes.

    Attributes:
      tokens: of one row; W - 1 or more, unless no row has more tokens than `tokens`.
      ahead: of them, loaded together; at most `tokens`.
      each: neighbouring channels of a lane.
      parts: times as many channels, further apart.
      num_warps: warps side by side along the channels.
    """

    tokens: int
    ahead: int
    each: int = 1
    parts: int = 1
    num_warps: int = 1

    def __post_init__(self):
        check_launch(self)
        if self.ahead > self.tokens:
            raise ValueError(
                f"ahead must be at most tokens = {self.tokens}, of which it is a part; "
                f"got {self.ahead}."
            )

    @property
    def lanes(self) -> int:
        return LANES * self.num_warps

    @property
    def channels(self) -> int:
        return self.lanes * self.each * self.parts


def heuristic(
    num_tokens: int,
    num_rows: int,
    channels: int,
    width: int,
    itemsize: int,
    *,
    ragged: bool,
) -> ConvConfig:
    """Ragged rows are taken to be of one length; `itemsize` is a token's."""
    mean = pl.next_power_of_2(-(-num_tokens // num_rows))
    # Only the first block of a row may need what the state holds.
    least = pl.next_power_of_2(max(width - 1, 1))
    if not ragged:
        least = min(least, mean)
    tokens = max(mean, least)
    if tokens <= AHEAD:
        return _short(num_tokens, channels, tokens)
    return _long(num_tokens, channels, itemsize, least)


def _short(num_tokens: int, channels: int, tokens: int) -> ConvConfig:
    """Decoding: the ring is most of the traffic, so a lane has what it loads of it, and
    several of those to wait for at once."""
    warps = -(-num_tokens // tokens) * -(-channels // LANES)
    parts, num_warps = max(1, min(4, AHEAD // tokens)), 4
    while parts > 1 and warps < ENOUGH_WARPS * parts:
        parts //= 2
    while num_warps > 1 and warps < ENOUGH_PROGRAMS * parts * num_warps:
        num_warps //= 2
    return ConvConfig(tokens, tokens, parts=parts, num_warps=num_warps)


def _long(num_tokens: int, channels: int, itemsize: int, least: int) -> ConvConfig:
    """Prefill: tokens are all the traffic, so a lane has 16 bytes of each. Shorter
    blocks make more programs, at less cost than narrower accesses do."""
    tokens = max(LONG_BLOCK, least)
    each = min(LOAD_BYTES // itemsize, channels & -channels)

    def warps() -> int:
        return -(-num_tokens // tokens) * -(-channels // (LANES * each))

    while tokens > max(least, AHEAD) and warps() < ENOUGH_WARPS:
        tokens //= 2
    while each > 1 and warps() < ENOUGH_WARPS:
        each //= 2
    return ConvConfig(tokens, AHEAD, each=each)
