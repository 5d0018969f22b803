"""What compiles for other GPUs than an H200. Kernels are compiled where they run: one
whose instructions or shared memory a GPU does not have fails there alone."""

import aot
import pytest
from aot import Gpu
from op_calls import OPS

A100 = Gpu("NVIDIA A100", "8.0", 163)
L4 = Gpu("NVIDIA L4", "8.9", 99)
B200 = Gpu("NVIDIA B200", "10.0a", 227)
THOR = Gpu("NVIDIA Thor", "11.0a", 227)
RTX = Gpu("NVIDIA RTX PRO 6000", "12.0a", 99)
# An abstract device does not say that it has too little for chunk_update, as a real one
# does: test_chunk_update.py
WHERE = {"chunk_update": (A100, THOR)}


# That they compile on every line of JAX is in the other test_compiled files.
@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *(("fused_update", gpu) for gpu in (A100, L4, B200, THOR)),
        *((name, gpu) for name in OPS for gpu in WHERE.get(name, (RTX,))),
    ],
    ids=lambda x: x.capability if isinstance(x, Gpu) else x,
)
def test_kernels_compile_for_other_gpus(name, gpu):
    call, shapes = OPS[name](4, 3, 4)
    compiled = aot.compile_for(gpu, call, *shapes, donate_argnums=0)
    assert any(aot.KERNEL_CALL in launch for launch in compiled.launches())
    target = f".target sm_{gpu.capability.replace('.', '')}"
    assert compiled.ptx and all(target in module for module in compiled.ptx)
