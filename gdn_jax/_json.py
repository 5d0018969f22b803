"""JSON that anyone may have written."""

import json
from collections.abc import Sequence
from typing import Any


def parse(text: str) -> dict[str, Any]:
    """An object.

    Raises:
      ValueError: it is none, or nests too deeply, or says a key twice, of which readers
        do not take the same one.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {name[:80]!a} twice")
        found[name] = value
    return found
