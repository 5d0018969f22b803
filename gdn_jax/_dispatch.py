"""The one place where an implementation is chosen."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gdn_jax import _triton
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


def run_kernel_or_xla(
    op: str,
    implementation: str | None,
    *,
    arrays: Any,
    why_not: Callable[[], str | None],
    kernel: Callable[[bool], Result],
    xla: Callable[[], Result],
) -> Result:
    """Of an op whose `reference` is its `xla` and whose kernel is for some calls alone.

    Where a process has several devices, None is xla: XLA shards arrays and does not
    tell, and would gather them for a kernel. Inside of `shard_map` they are whole.

    Args:
      op: its name, for errors.
      arrays: the call's.
      why_not: why the kernel cannot take the call, whatever the device; None where it
        can.
      kernel: runs it, given whether in the interpreter.
    """
    check_name(implementation)
    if implementation is None and not _triton.is_whole():
        implementation = "xla"

    def run_kernel(interpret: bool) -> Result:
        if not interpret:
            _triton.device_kind(arrays)
        reason = why_not()
        if reason is not None:
            raise NotImplementedError(
                f"{op}: the kernel cannot take this call: {reason}. Use "
                f"implementation='xla'."
            )
        return kernel(interpret)

    paths = {
        "triton": lambda: run_kernel(False),
        "interpret": lambda: run_kernel(True),
        "xla": xla,
        "reference": xla,
    }
    return run(paths, implementation)


def where_it_can(
    implementation: str | None, arrays: Any, why_not: Callable[[], str | None]
) -> str | None:
    """What a layer's op runs: of many ops of one `implementation`, those whose kernel
    cannot take their call run XLA's. A machine that has no kernels is told all the
    same."""
    if implementation not in ("triton", "interpret") or why_not() is None:
        return implementation
    if implementation == "triton":
        _triton.device_kind(arrays)
    return None


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
