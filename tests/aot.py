"""Compiles for an H200 or another GPU, on a machine without one, and reads what came
out.

Needs the `aot` extra and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 (set in conftest.py).
"""

import dataclasses
import functools
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec
from sass import stale_selects

TARGET = pathlib.Path(__file__).parent / "data" / "h200_target_config.txtpb"


def _abstract(kind: str) -> AbstractMesh:
    return AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, "cuda"))


ABSTRACT_H200 = _abstract("NVIDIA H200")
KERNEL_CALL = "__gpu$xla.gpu.triton"
# As by default; conftest.py turns it off for programs that run on a CPU.
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}


def lower(f, *args, **jit_options) -> str:
    """StableHLO for CUDA; needs no CUDA package at all."""
    with jax.sharding.use_abstract_mesh(ABSTRACT_H200):
        traced = jax.jit(f, **jit_options).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@dataclasses.dataclass(frozen=True)
class Compiled:
    hlo: str
    alias_bytes: int
    temp_bytes: int
    ptx: tuple[str, ...]  # one module a kernel

    @property
    def entry(self) -> list[str]:
        """The entry computation's instructions; fusions' own bodies are left out."""
        body = self.hlo[self.hlo.index("ENTRY ") :]
        return [line.strip() for line in body.splitlines()[1:] if " = " in line]

    def launches(self) -> list[str]:
        """Instructions of the entry computation that start work on the device."""
        free = r" (parameter|tuple|get-tuple-element|bitcast|constant)\("
        return [line for line in self.entry if not re.search(free, line)]

    def resources(self) -> dict[str, int]:
        """The most registers and all spilled bytes, as ptxas reports for sm_90a; raises
        where it is known to have compiled a kernel wrongly."""
        return _resources(self.ptx)


def compile_for_h200(f, *args, **jit_options) -> Compiled:
    return _compile(TARGET.read_text(), ABSTRACT_H200, f, *args, **jit_options)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An H200 in all but this. `kind` is a name that JAX knows the capability of, which
    ends in "a" where there are instructions of that GPU alone; `shared_memory`: KB that
    a program can have."""

    kind: str
    capability: str
    shared_memory: int


def compile_for(gpu: Gpu, f, *args, **jit_options) -> Compiled:
    major, minor = gpu.capability.removesuffix("a").split(".")
    extension = "    feature_extension: ACCELERATED_FEATURES\n"
    text = TARGET.read_text()
    for old, new in (
        ("major: 9\n", f"major: {major}\n    minor: {minor}\n"),
        (extension, extension if gpu.capability.endswith("a") else ""),
        ("optin: 232448", f"optin: {gpu.shared_memory << 10}"),
        ("Capability 9.0a", f"Capability {gpu.capability}"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return _compile(text, _abstract(gpu.kind), f, *args, **jit_options)


def _compile(target: str, device: AbstractMesh, f, *args, **jit_options) -> Compiled:
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=target
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    with tempfile.TemporaryDirectory() as folder:
        options = OPTIMIZED | {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        with jax.sharding.use_abstract_mesh(device):
            lowered = jax.jit(f, **jit_options).lower(*args)
        compiled = lowered.compile(compiler_options=options)
        dumped = (path.read_text() for path in pathlib.Path(folder).glob("*.ptx"))
        ptx = tuple(filter(None, dumped))  # XLA's own module may have no kernel
    memory = compiled.memory_analysis()
    return Compiled(
        compiled.as_text(), memory.alias_size_in_bytes, memory.temp_size_in_bytes, ptx
    )


def copies(compiled: Compiled, pool) -> list[str]:
    """Instructions that copy an array of a pool's shape."""
    shape = f"[{','.join(map(str, pool.shape))}]"
    return [
        line
        for line in compiled.hlo.splitlines()
        if " copy" in line.split("(")[0] and shape in line.split("(")[0]
    ]


@functools.cache
def _resources(ptx: tuple[str, ...]) -> dict[str, int]:
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        binary = source.with_suffix(".cubin")
        command = [_tool("ptxas"), "-arch=sm_90a", "-v", source, "-o", binary]
        for module in ptx:
            source.write_text(module)
            text += _run(command)
            if selects := stale_selects(_run([_tool("nvdisasm"), "-c", binary])):
                raise RuntimeError(f"ptxas compiled a kernel wrongly: {selects}")
    spilled = re.findall(r"(\d+) bytes spill", text)
    registers = re.findall(r"Used (\d+) registers", text)
    return {"registers": max(map(int, registers)), "spills": sum(map(int, spilled))}


def _run(command: list) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stderr + run.stdout


@functools.cache
def _tool(name: str) -> str:
    packages = pathlib.Path(sysconfig.get_paths()["purelib"])
    found = sorted(packages.glob(f"nvidia/*/bin/{name}"))
    path = str(found[-1]) if found else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} not found; install the `aot` extra")
    return path
