"""The projections of a token, laid out as checkpoints have them: one module each."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gdn_jax import _types as t
from gdn_jax._dispatch import where_it_can
from gdn_jax.nn.initializers import Initializer
from gdn_jax.ops.few_rows.api import products, why_not


@dataclasses.dataclass(frozen=True)
class Heads:
    """How many heads of which dims; the letters of _types.py."""

    H: int
    HV: int
    K: int
    V: int

    @property
    def group(self) -> int:
        """Value heads of one key head."""
        return self.HV // self.H

    @property
    def channels(self) -> int:
        """C: q, k and v, flat."""
        return sum(self.split)

    @property
    def split(self) -> tuple[int, int, int]:
        """Of the channels, those of q, k and v."""
        return self.H * self.K, self.H * self.K, self.HV * self.V

    def apart(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """q, k [.. H K] and v [.. HV V], of flat ones."""
        return _per_head(q, self.H), _per_head(k, self.H), _per_head(v, self.HV)


class Projected(NamedTuple):
    """What one token is projected to.

    Attributes:
      channels: [.. C], q, k and v before the convolution, flat.
      z: [.. HV V], the output gate.
      a: [.. HV], the decay's logits; [.. HV K] with per-K decay.
      b: [.. HV], beta's logits.
    """

    channels: Array
    z: Array
    a: Array
    b: Array


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How projections are made; the fields are `GatedDeltaNet`'s."""

    dtype: Any
    param_dtype: Any
    kernel_init: Initializer

    def dense(self, features: int, *axes: str | None) -> "Matrix":
        return Matrix(features, axes, self)


class Matrix(nn.Module):
    """x @ kernel, [.. D] to [.. features].

    As `nn.Dense` without a bias, parameter and all, but that several can be applied
    together; see `multiply`.

    Attributes:
      features: of y.
      axes: the kernel's logical axis names.
      matrices: how it is made.
    """

    features: int
    axes: tuple[str | None, ...]
    matrices: Matrices

    def __call__(self, x: Array, implementation: str | None = None) -> Array:
        [y] = multiply(x, self, implementation=implementation)
        return y

    def parts(self, x: Array, implementation: str | None = None) -> Array:
        """[S ..] whose sum over S the call gives; for what sums anyway."""
        [y] = multiply(x, self, parts=True, implementation=implementation)
        return y

    @nn.compact
    def kernel(self, size: int) -> Array:
        """[size features], in the dtype that is multiplied in."""
        made = self.matrices
        init = nn.with_logical_partitioning(made.kernel_init, self.axes)
        kernel = self.param("kernel", init, (size, self.features), made.param_dtype)
        return jnp.asarray(kernel, made.dtype)


def multiply(
    x: Array,
    *matrices: Matrix,
    live: Array | None = None,
    gated: bool = False,
    parts: bool = False,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """x by several matrices; in decoding, by one launch. See `products`.

    implementation: of the product. What a kernel cannot take is XLA's.
    """
    kernels = [matrix.kernel(x.shape[-1]) for matrix in matrices]
    x = jnp.asarray(x, kernels[0].dtype)
    return products(
        x,
        kernels,
        live=live,
        gated=gated,
        parts=parts,
        implementation=where_it_can(implementation, x, lambda: why_not(x, kernels)),
    )


class LowRank(nn.Module):
    """Two matrices, to value heads through `rank` features."""

    features: int
    rank: int
    matrices: Matrices

    def setup(self):
        self.down = self.matrices.dense(self.rank, "embed", None)
        self.up = self.matrices.dense(self.features, None, "gdn_value_heads")


class Layout(nn.Module):
    """What the layouts share. Their call's `live` is as in `products`.

    Attributes:
      heads: numbers and dims of heads.
      matrices: how the projections are made.
      per_key_decay: `a` has an entry for each K.
      gate_rank: if given, `a` and `z` are projected through so many features.
    """

    heads: Heads
    matrices: Matrices
    per_key_decay: bool
    gate_rank: int | None

    def gate(self, features: int) -> "Matrix | LowRank":
        if self.gate_rank is None:
            return self.matrices.dense(features, "embed", "gdn_value_heads")
        return LowRank(features, self.gate_rank, self.matrices)

    def gates_and_beta(self) -> tuple[Any, Any, Matrix]:
        """The projections of z, a and b, where they are matrices of their own."""
        HV, K, V = self.heads.HV, self.heads.K, self.heads.V
        z = self.gate(HV * V)
        a = self.gate(HV * K if self.per_key_decay else HV)
        return z, a, self.matrices.dense(HV, "embed", "gdn_value_heads")

    def project(
        self, x: Array, *before: Matrix, live: Array | None, implementation: str | None
    ) -> tuple[Array, ...]:
        """x by these matrices, then z, a and b; in one call where each is a matrix."""
        HV = self.heads.HV
        call: dict[str, Any] = dict(live=live, implementation=implementation)
        if self.gate_rank is None:
            *found, z, a, b = multiply(x, *before, self.z, self.a, self.b, **call)
        else:
            downs = self.z.down, self.a.down
            *found, b, z, a = multiply(x, *before, self.b, *downs, **call)
            z, a = self.z.up(z, implementation), self.a.up(a, implementation)
        a = _per_head(a, HV) if self.per_key_decay else a
        return *found, _per_head(z, HV), a, b


class Interleaved(Layout):
    """Two matrices, by key heads: [q | k | v | z] and [b | a] (Qwen3-Next).

    `whole`, here and in `Flat`, is what `fused_layer_step` takes: nothing moves.
    """

    def setup(self):
        H, group, K, V = self.heads.H, self.heads.group, self.heads.K, self.heads.V
        per_key_head = 2 * K + 2 * group * V
        self.qkvz = self.matrices.dense(H * per_key_head, "embed", "gdn_key_heads")
        self.ba = self.matrices.dense(H * 2 * group, "embed", "gdn_key_heads")

    def whole(
        self, x: t.Hidden, live: Array | None, implementation: str | None
    ) -> tuple[Any, Any]:
        call: dict[str, Any] = dict(live=live, implementation=implementation)
        qkvz, ba = multiply(x, self.qkvz, self.ba, **call)
        return qkvz, ba

    def __call__(
        self, x: t.Hidden, live: Array | None, implementation: str | None
    ) -> Projected:
        H, HV, K, V = dataclasses.astuple(self.heads)
        qkvz, ba = self.whole(x, live, implementation)
        ends = [K, 2 * K, 2 * K + self.heads.group * V]
        *qkv, z = jnp.split(_per_head(qkvz, H), ends, axis=-1)
        b, a = jnp.split(_per_head(ba, H), 2, axis=-1)
        channels = jnp.concatenate([flat(part) for part in qkv], axis=-1)
        return Projected(channels, _per_head(flat(z), HV), flat(a), flat(b))


class Flat(Layout):
    """One matrix for [q | k | v], one each for z, b and a (Qwen3.5)."""

    def setup(self):
        self.qkv = self.matrices.dense(self.heads.channels, "embed", "gdn_channels")
        self.z, self.a, self.b = self.gates_and_beta()

    def whole(
        self, x: t.Hidden, live: Array | None, implementation: str | None
    ) -> tuple[Any, Any]:
        qkv, z, a, b = self(x, live, implementation)
        return (qkv, flat(z)), (b, a)

    def __call__(
        self, x: t.Hidden, live: Array | None, implementation: str | None
    ) -> Projected:
        call: dict[str, Any] = dict(live=live, implementation=implementation)
        return Projected(*self.project(x, self.qkv, **call))


class Separate(Layout):
    """A matrix each for q, k, v, z, b and a (OLMo-hybrid, Kimi-Linear)."""

    def setup(self):
        H, HV, K, V = dataclasses.astuple(self.heads)
        self.q = self.matrices.dense(H * K, "embed", "gdn_key_heads")
        self.k = self.matrices.dense(H * K, "embed", "gdn_key_heads")
        self.v = self.matrices.dense(HV * V, "embed", "gdn_value_heads")
        self.z, self.a, self.b = self.gates_and_beta()

    def __call__(
        self, x: t.Hidden, live: Array | None, implementation: str | None
    ) -> Projected:
        call: dict[str, Any] = dict(live=live, implementation=implementation)
        *qkv, z, a, b = self.project(x, self.q, self.k, self.v, **call)
        return Projected(jnp.concatenate(qkv, axis=-1), z, a, b)


LAYOUTS = {"interleaved": Interleaved, "flat": Flat, "separate": Separate}


def _per_head(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
