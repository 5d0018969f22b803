"""What devices send each other, as an optimised program's text says."""

import re

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


def collectives(text: str) -> dict[str, int]:
    """How many there are of each that there is; what is in a loop counts once.

    text: of `jitted.lower(..).compile().as_text()`.
    """
    found = {
        name: len(re.findall(rf"\s{name}(?:-start)?\(", text)) for name in COLLECTIVES
    }
    return {name: count for name, count in found.items() if count}
