"""The library's only door to Pallas' Triton lowering: launching, device facts.

The lowering is deprecated upstream since JAX 0.11 (docs/pallas/CHANGELOG) and still
there in 0.12. When it goes, this file and the kernels' launch functions change.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import AxisType

load = pltriton.load
store = pltriton.store
dot = pltriton.dot
barrier = pltriton.debug_barrier
atomic_add = pltriton.atomic_add

LANES = 32  # of a warp
MAX_WARPS = 32  # of a program: CUDA's limit of a block
# KB of a program; compute capabilities that are not named have the latter and more.
LITTLE_SHARED_MEMORY, MUCH_SHARED_MEMORY = 99, 163
WITH_LITTLE_SHARED_MEMORY = ("8.6", "8.9", "12.0", "12.1")
MIN_COMPUTE_CAPABILITY = 8.0  # Triton's floor for bfloat16

# Emitted at every lowering; under `-W error` it would stop the lowering itself.
DEPRECATION = "The Pallas Triton backend is deprecated"
warnings.filterwarnings("ignore", message=DEPRECATION, category=DeprecationWarning)


def check_launch(config: Any, *any_number: str) -> None:
    """A launch config's fields are powers of two, but for those of `any_number`; those
    that end in "warps" are what a program can have."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive int; got {value!r}")
        if name not in any_number and value & (value - 1):
            raise ValueError(
                f"{name} must be a power of two; got {value}. Take "
                f"{1 << value.bit_length() - 1}."
            )
        if name.endswith("warps") and value > MAX_WARPS:
            raise ValueError(
                f"{name} must be at most {MAX_WARPS}, CUDA's limit of a block; got "
                f"{value}."
            )


def device_kind(arrays: Any) -> str:
    """The kind of the NVIDIA GPU that a kernel over `arrays` would be compiled for.

    An abstract device (lowering and compiling ahead of time) comes first, then that of
    the first array if it has one, then JAX's default. Under `jit` arrays have none.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        if abstract.platform not in ("cuda", "gpu"):
            raise NotImplementedError(
                f"the triton implementation needs an NVIDIA GPU; the abstract device "
                f"is {abstract.device_kind!r} on {abstract.platform!r}"
            )
        return abstract.device_kind
    device = _device(arrays)
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        raise NotImplementedError(
            f"the triton implementation needs an NVIDIA GPU (or an abstract CUDA "
            f"device, to compile ahead of time); this call runs on "
            f"{device.device_kind!r}. Use implementation='xla', or 'interpret' to run "
            f"the same kernel here."
        )
    if float(device.compute_capability) < MIN_COMPUTE_CAPABILITY:
        raise NotImplementedError(
            f"the triton implementation needs compute capability "
            f"{MIN_COMPUTE_CAPABILITY} or newer; {device.device_kind!r} has "
            f"{device.compute_capability}. Use implementation='xla'."
        )
    return device.device_kind


def is_whole() -> bool:
    """Whether no array under `jit` can be a part's of one that XLA shards."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:  # as around lowering for a device that is not here
        return mesh.abstract_device is not None or jax.device_count() == 1
    return mesh.size == 1 or set(mesh.axis_types) == {AxisType.Manual}


def shared_memory(arrays: Any) -> int:
    """KB of it that a program can count on."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return MUCH_SHARED_MEMORY
    capability = str(getattr(_device(arrays), "compute_capability", ""))
    little = capability in WITH_LITTLE_SHARED_MEMORY
    return LITTLE_SHARED_MEMORY if little else MUCH_SHARED_MEMORY


def need_shared_memory(arrays: Any, op: str) -> None:
    """For kernels that take more of it than every GPU has."""
    if shared_memory(arrays) < MUCH_SHARED_MEMORY:
        device = _device(arrays)
        raise NotImplementedError(
            f"{op}'s kernels need {MUCH_SHARED_MEMORY} KB of shared memory a program; "
            f"{device.device_kind!r} (compute capability {device.compute_capability}) "
            f"has {LITTLE_SHARED_MEMORY}. Use implementation='xla'."
        )


def _device(arrays: Any) -> Any:
    first = next(iter(jax.tree.leaves(arrays)), None)  # the state, or the first logits
    if isinstance(first, jax.Array) and not isinstance(first, Tracer):
        return next(iter(first.devices()))
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def load_where(at: Any, mask: jax.Array | None) -> jax.Array:
    """0 where the mask is not; None: all of it."""
    return load(at, mask=mask, other=None if mask is None else 0)


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x * y + z in one rounding, inside a compiled kernel; float32, broadcasting.

    XLA compiles Triton kernels without contracting products into sums, so a kernel that
    wants FMA has to say so.
    """
    for value in (x, y, z):
        if value.dtype != jnp.float32:  # of whose bits the instruction would take 32
            raise TypeError(f"multiply_add takes float32; got {value.dtype}")
    shape = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    [result] = pltriton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(value, shape) for value in (x, y, z)],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result


def join(parts: Sequence[jax.Array]) -> jax.Array:
    """[...] x E -> [... E], pair by pair: Triton joins no more than two values."""
    shape = (*parts[0].shape, len(parts))
    while len(parts) > 1:
        half = len(parts) // 2
        pairs = zip(parts[:half], parts[half:], strict=True)
        parts = [jnp.stack(pair, axis=-1) for pair in pairs]
    return parts[0].reshape(shape)


def shape_of(array: jax.Array) -> tuple[tuple[int, ...], Any]:
    """Of a `launch`'s output like it."""
    return array.shape, array.dtype


def launch(
    kernel: Callable[..., None],
    inputs: Any,
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: Sequence[int],
    aliases: dict[int, int],
    num_warps: int,
    num_stages: int = 1,
    interpret: bool,
) -> Any:
    """Runs `kernel(inputs, *outputs)` on unblocked references, once per grid point.

    `inputs` is one pytree of arrays, `outputs` a sequence of (shape, dtype); `aliases`
    maps flat input numbers to output numbers. Grid axis 0 is the fastest. Under
    `shard_map` an output varies as the input that it replaces, others as any input.
    """
    leaves, varying = jax.tree.leaves(inputs), varying_axes(inputs)
    types = {
        output: jax.typeof(leaves[i]).manual_axis_type for i, output in aliases.items()
    }
    out_shape = tuple(
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=types.get(i, varying))
        for i, (shape, dtype) in enumerate(outputs)
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=tuple(grid),
        out_shape=out_shape,
        in_specs=[jax.tree.map(lambda _: anywhere, inputs)],
        out_specs=tuple(anywhere for _ in out_shape),
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        ),
    )(inputs)


def varying_axes(arrays: Any) -> Any:
    """The type of a result under `shard_map`: it varies over every mesh axis that an
    input varies over."""
    types = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(arrays)]
    return type(types[0])(varying=frozenset().union(*(t.varying for t in types)))


def varying_like(state: jax.Array, arrays: Any) -> jax.Array:
    """Under `shard_map` a new state varies over every mesh axis that anything does;
    loops carry it, so the old one is made to."""
    given = jax.typeof(state).manual_axis_type.varying
    axes = varying_axes(arrays).varying - given
    return lax.pcast(state, tuple(axes), to="varying") if axes else state
