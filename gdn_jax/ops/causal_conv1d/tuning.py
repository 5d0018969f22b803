"""How the convolution's kernel is cut up."""

import dataclasses

from gdn_jax.ops.causal_conv1d.call import Inputs, Options

LANES = 32
LOAD_BYTES = 16
AHEAD = 8
# Of an H200's 132 cores each then has 16 warps, which keep enough loads in flight.
ENOUGH_WARPS = 2048
ENOUGH_PROGRAMS = 256
# A program's filter, and the inputs before its tokens, are then few beside them.
LONG_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a program takes.

    Attributes:
      tokens: of one row; W - 1 or more, unless no row has more tokens than that.
      ahead: of them, loaded together; it divides `tokens`.
      each: neighbouring channels of a lane.
      parts: times as many channels, further apart.
      num_warps: warps side by side along the channels.
    """

    tokens: int
    ahead: int
    each: int = 1
    parts: int = 1
    num_warps: int = 1

    @property
    def lanes(self) -> int:
        return LANES * self.num_warps

    @property
    def channels(self) -> int:
        return self.lanes * self.each * self.parts


def choose(x: Inputs, options: Options) -> Blocks:
    """A heuristic; ragged rows are taken to be of one length."""
    width = x.weight.shape[1]
    mean = next_power_of_2(-(-x.x.shape[0] // x.num_rows))
    # Only the first block of a row may need what the state holds.
    least = next_power_of_2(max(width - 1, 1))
    if options.tokens_per_row is not None:
        least = min(least, mean)
    tokens = max(mean, least)
    return _short(x, tokens) if tokens <= AHEAD else _long(x, least)


def _short(x: Inputs, tokens: int) -> Blocks:
    """Decoding: the ring is most of the traffic, so a lane has what it loads of it, and
    several of those to wait for at once."""
    warps = -(-x.x.shape[0] // tokens) * -(-x.x.shape[1] // LANES)
    parts, num_warps = max(1, min(4, AHEAD // tokens)), 4
    while parts > 1 and warps < ENOUGH_WARPS * parts:
        parts //= 2
    while num_warps > 1 and warps < ENOUGH_PROGRAMS * parts * num_warps:
        num_warps //= 2
    return Blocks(tokens, tokens, parts=parts, num_warps=num_warps)


def _long(x: Inputs, least: int) -> Blocks:
    """Prefill: tokens are all the traffic, so a lane has 16 bytes of each. Shorter
    blocks make more programs, at less cost than narrower accesses do."""
    num_tokens, channels = x.x.shape
    tokens = max(LONG_BLOCK, least)
    each = min(LOAD_BYTES // x.x.dtype.itemsize, channels & -channels)

    def warps() -> int:
        return -(-num_tokens // tokens) * -(-channels // (LANES * each))

    while tokens > max(least, AHEAD) and warps() < ENOUGH_WARPS:
        tokens //= 2
    while each > 1 and warps() < ENOUGH_WARPS:
        each //= 2
    return Blocks(tokens, AHEAD, each=each)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
