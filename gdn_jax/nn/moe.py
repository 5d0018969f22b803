"""The mixture-of-experts layer of Qwen3-Next and Qwen3.5-MoE."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import gdn_jax
from gdn_jax._dispatch import where_it_can
from gdn_jax.nn.initializers import Initializer
from gdn_jax.nn.mlp import GatedMLP
from gdn_jax.nn.projections import Matrices, multiply
from gdn_jax.nn.split import Split
from gdn_jax.ops import checks
from gdn_jax.ops.routing.api import route, why_not
from gdn_jax.ops.routing.call import Routes


class MixtureOfExperts(nn.Module):
    """Each token goes through a few of many small gated MLPs, and through a shared one.

        p = softmax(router(x))                                        [E], float32
        y = sum over the top k of p: p_e * expert_e(x)
            + sigmoid(shared_gate(x)) * shared(x)
        expert_e(x) = down_e(silu(gate_e(x)) * up_e(x))

    with p_e divided by the sum of the k where `norm_topk`. Every token has all its
    experts, whatever others chose: there is no capacity, and none influences another.

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax.nn import MixtureOfExperts
        >>> layer = MixtureOfExperts(64, 8, 2, 32, 32)    # Qwen3-Next's: 2048, 512, ..
        >>> x = jnp.ones((2, 3, 64))
        >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
        (2, 3, 64)

    As transformers 5.23's Qwen3NextSparseMoeBlock and Qwen3_5MoeSparseMoeBlock, but
    that the weights p_e and the sum over experts stay float32.

    Attributes:
      hidden_size: D, of x and y.
      num_experts: E.
      experts_per_token: k.
      expert_size: F, of an expert's gate and up.
      shared_size: the same of the shared expert.
      norm_topk: whether the weights of a token's experts add up to 1.
      dtype: of the products and of y; softmax and sums are float32.
      param_dtype: of parameters. Experts of another dtype than `dtype` are cast at
        every call, which reads and writes all of them.
      kernel_init: of all matrices.
      implementation: of the experts' products, as in `grouped_dot`, and of the other
        products and the choice of experts, whose kernels are for up to 128 tokens; what
        they cannot take is XLA's.
      split: given inside of `shard_map` alone, where devices share the experts out, and
        the shared one's columns, of which `shared_size` are this device's: y is to be
        summed over the devices.

    Parameters: `router` [D, E], `experts_gate_up` [E, D, 2 F] (gate first),
    `experts_down` [E, F, D], `shared` (a `GatedMLP`), `shared_gate` [D, 1]; their
    logical axis names are "experts", "embed" (D) and "mlp" (F).
    """

    hidden_size: int
    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_size: int
    norm_topk: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    implementation: str | None = None
    split: Split | None = None

    def __post_init__(self):
        _check_fields(self)
        super().__post_init__()

    def setup(self):
        D, E, F = self.hidden_size, self.num_experts, self.expert_size
        own = E if self.split is None else E // self.split.parts

        def experts(name, shape, *axes) -> Any:
            init = nn.with_logical_partitioning(self.kernel_init, ("experts", *axes))
            return self.param(name, init, (own, *shape), self.param_dtype)

        made = self.dtype, self.param_dtype, self.kernel_init
        matrices = Matrices(*made)
        self.router = matrices.dense(E, "embed", "experts")
        self.experts_gate_up = experts("experts_gate_up", (D, 2 * F), "embed", "mlp")
        self.experts_down = experts("experts_down", (F, D), "mlp", "embed")
        self.shared = GatedMLP(D, self.shared_size, *made)
        self.shared_gate = matrices.dense(1, "embed", None)

    def __call__(self, x: ArrayLike, live: ArrayLike | None = None) -> Array:
        """The layer's y, of x's shape, in `dtype`.

        Args:
          x: [..., D].
          live: [...] bool; False: a token of padding, which takes no expert. Its y is
            exactly zero, and NaN in its x reaches nothing, gradients included.

        Raises:
          ValueError: the call is wrong; the text names the argument and the remedy.
          NotImplementedError: `implementation` cannot run here.
        """
        x, live = _check_tokens(x, live, self.hidden_size)
        x = x.astype(self.dtype)
        tokens = x.reshape(-1, self.hidden_size)
        live = None if live is None else live.reshape(-1)
        scores, gate, up, share = multiply(
            tokens,
            self.router,
            self.shared.gate,
            self.shared.up,
            self.shared_gate,
            live=live,
            implementation=self.implementation,
        )
        y = self.mix(tokens, self.route(scores, live))
        shared = self.shared.down(jax.nn.silu(gate) * up, self.implementation)
        y = y + jax.nn.sigmoid(share) * shared
        return y.astype(self.dtype).reshape(x.shape)

    def route(self, scores: Array, live: Array | None) -> Routes:
        return route(
            scores,
            live,
            k=self.experts_per_token,
            normalize=self.norm_topk,
            implementation=where_it_can(
                self.implementation, scores, lambda: why_not(scores)
            ),
        )

    def mix(self, x: Array, routes: Routes) -> Array:
        """[L D] float32: the experts' part."""
        if self.split is not None:
            routes = self.split.own_routes(routes)
        rows = x[routes.token]
        gate, up = jnp.split(self.by_experts(rows, self.experts_gate_up, routes), 2, -1)
        y = self.by_experts(jax.nn.silu(gate) * up, self.experts_down, routes)
        each = y[routes.place].astype(jnp.float32)  # [L k D]
        return jnp.sum(routes.weights[..., None] * each, axis=1)

    def by_experts(self, rows: Array, weights: ArrayLike, routes: Routes) -> Array:
        return gdn_jax.grouped_dot(
            rows,
            jnp.asarray(weights, self.dtype),
            routes.group_sizes,
            implementation=self.implementation,
        )


def _check_fields(layer: MixtureOfExperts) -> None:
    for name in (
        "hidden_size",
        "num_experts",
        "experts_per_token",
        "expert_size",
        "shared_size",
    ):
        checks.count(name, getattr(layer, name), "It is a size.")
    if layer.experts_per_token > layer.num_experts:
        wanted = f"at most num_experts = {layer.num_experts}"
        remedy = "A token takes an expert once."
        checks.fail("experts_per_token", layer.experts_per_token, wanted, remedy)


def _check_tokens(x: Any, live: Any, hidden_size: int) -> tuple[Array, Array | None]:
    x = checks.floating("x", x)
    if x.ndim < 1 or x.shape[-1] != hidden_size:
        remedy = "The last axis is the layer's hidden_size."
        checks.fail("x", x.shape, f"[..., {hidden_size}]", remedy)
    if live is None:
        return x, None
    live = checks.booleans("live", live)
    if live.shape != x.shape[:-1]:
        checks.fail("live", live.shape, f"{x.shape[:-1]}", "One entry a token.")
    return x, live
