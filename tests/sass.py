"""What ptxas makes of a kernel, read for one of its faults.

Short of registers, ptxas makes a select between two constants again where it is used,
and CUDA 13.0 and 13.5 have been seen to do so from a predicate that a comparison of
floating numbers had overwritten since: out went to another row's place.
"""

import re

INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;"
)
PREDICATE = re.compile(r"U?P\d")
CONSTANT = re.compile(r"RZ|-?0x[0-9a-f]+")
OF_FLOATS = ("FSETP", "HSETP2", "DSETP")


def stale_selects(text: str) -> list[str]:
    """Of nvdisasm's text the selects between two constants that were made from a
    comparison of integers before, and are now from one of floating numbers."""
    found: list[str] = []
    made_by: dict[str, str] = {}  # what wrote each predicate last
    selects: dict[tuple[str, ...], str] = {}
    for line in text.splitlines():
        if line.startswith(".text."):  # another kernel
            made_by, selects = {}, {}
        match = INSTRUCTION.search(line)
        if match is None:
            continue
        op, words = match[1].split(".")[0], re.split(r",\s*", match[2])
        if op == "SEL" and all(map(CONSTANT.fullmatch, words[1:3])):
            maker = made_by.get(words[3].lstrip("!"), "")
            first = selects.setdefault(tuple(words[1:]), maker)
            if maker in OF_FLOATS and first not in OF_FLOATS:
                found.append(line.strip())
        elif op not in ("SEL", "FSEL"):  # which read theirs; others write first
            made_by |= {word: op for word in words[:2] if PREDICATE.fullmatch(word)}
    return found
