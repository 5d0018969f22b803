"""Which experts tokens go to: which implementation runs."""

from jax import Array

from gdn_jax import _dispatch
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.routing.call import Inputs, Options, Routes
from gdn_jax.ops.routing.triton import triton
from gdn_jax.ops.routing.xla import xla

MAX_TOKENS = 128  # of pairs every one is compared with every other
MAX_EXPERTS = 1024


def route(
    scores: Array,
    live: Array | None,
    *,
    k: int,
    normalize: bool,
    implementation: str | None = None,
) -> Routes:
    """Chooses each token's experts, and sorts the pairs of both by experts.

        p = softmax(scores);  weights, experts = top_k(p)        in float32

    Args:
      scores: [L, E], of the router.
      live: [L] bool; False: a token of padding, whose pairs are of no expert, behind
        all others. None: all count.
      k: experts of a token.
      normalize: divide a token's weights by their sum.
      implementation: "triton" (two launches, up to 128 tokens), "interpret", "xla" or
        "reference" (one and the same, of a dozen launches); None: as in `products`.

    Returns:
      `Routes`. Pairs of one expert stay in the order of their tokens.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run this call here.

    Transformations: as in `products`; gradients are those of the weights.
    """
    _check(scores, live, k)
    inputs, options = Inputs(scores, live), Options(k, normalize)

    def kernel(interpret: bool) -> Routes:
        return vjp.launched(PATHS[interpret], options, None, inputs)

    return _dispatch.run_kernel_or_xla(
        "choice of experts",
        implementation,
        arrays=inputs,
        why_not=lambda: why_not(scores),
        kernel=kernel,
        xla=lambda: xla(inputs, options),
    )


def _check(scores: Array, live: Array | None, k: int) -> None:
    if scores.ndim != 2:
        checks.fail("scores", scores.shape, "[L, E]", "One for a token and expert.")
    if live is not None and live.shape != scores.shape[:1]:
        wanted = f"[L] = {scores.shape[:1]}"
        checks.fail("live", live.shape, wanted, "One entry a token.")
    if not 1 <= k <= scores.shape[1]:
        wanted = f"1 to {scores.shape[1]}, the experts that there are"
        checks.fail("k", k, wanted, "A token takes an expert once.")


def why_not(scores: Array) -> str | None:
    """Why the kernels cannot run a call, whatever the device; None where they can."""
    num_tokens, num_experts = scores.shape
    if not 1 <= num_tokens <= MAX_TOKENS:
        return f"they take 1 to {MAX_TOKENS} tokens; got {num_tokens}"
    if num_experts > MAX_EXPERTS:
        return f"they take up to {MAX_EXPERTS} experts; got {num_experts}"
    return None


PATHS = vjp.kernel_paths(triton, vjp.backward_of(xla))
