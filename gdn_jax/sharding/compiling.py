"""What XLA is told of programs in which GPUs sum what each has: data, by device."""

from __future__ import annotations  # so that help() names types and expands none

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

# The first JAX whose XLA sums small arrays by kernels of its own, which no CUDA graph
# captures: a step is cut into as many graphs as it has sums. NCCL's can be captured,
# and of buffers that GPUs hold at like places (symmetric) are one kernel that reads
# them.
FIRST_JAX = (0, 11)
IN_GRAPHS = {
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_enable_command_buffer": (  # XLA's own and COLLECTIVES
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,"
        "COLLECTIVES"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_experimental_enable_nccl_symmetric_buffers": True,
}
# By kind of device, where it was measured to be faster: `benchmarks/sharded.py`.
MEASURED: Mapping[str, Mapping[str, Any]] = {"NVIDIA H200": IN_GRAPHS}


def options_of(mesh: Mesh) -> Mapping[str, Any]:
    """For `jax.jit(..., compiler_options=)` of a program with sums over this mesh;
    empty, XLA's own choice, but for several GPUs of one process that were measured."""
    devices = mesh.devices.ravel()
    kinds = {device.device_kind for device in devices}
    processes = {device.process_index for device in devices}
    if (
        len(kinds) != 1
        or len(processes) != 1
        or mesh.size == 1
        or jax.__version_info__ < FIRST_JAX
    ):
        return {}
    return MEASURED.get(kinds.pop(), {})
