"""The one place where an implementation is chosen."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gdn_jax.ops import checks

Result = TypeVar("Result")

IMPLEMENTATIONS = ("triton", "interpret", "xla", "reference")

WITHOUT_LAUNCH = ("xla", "reference")

# What `None` tries, best first; the last runs anywhere. The interpreter and the oracle
# are never a fallback.
PREFERENCE = ("triton", "xla")


def check_name(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; "
            f"got {implementation!r}. None picks the best that can run here."
        )


def check_config(config: Any, kind: type, implementation: str | None) -> None:
    """A launch that is asked for is never left out in silence."""
    if config is None:
        return
    if not isinstance(config, kind):
        remedy = "None chooses one."
        checks.fail("config", repr(config), f"a {kind.__name__} or None", remedy)
    if implementation in WITHOUT_LAUNCH:
        got = f"{config!r} with implementation={implementation!r}"
        remedy = "Leave one of the two out: it has no launch to pin."
        checks.fail("config", got, "None there", remedy)


def run(
    paths: Mapping[str, Callable[[], Result]], implementation: str | None
) -> Result:
    """Runs the implementation asked for, or the first preferred one that can run.

    A path that cannot run the call here raises NotImplementedError with its reason.
    """
    if implementation is not None:
        return paths[implementation]()
    *preferred, last = PREFERENCE
    for name in preferred:
        try:
            return paths[name]()
        except NotImplementedError:
            continue
    return paths[last]()
