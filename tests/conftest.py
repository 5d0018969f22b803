"""Runs before JAX is imported: every test of a session sees the same machine."""

import fcntl
import gc
import importlib
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # compiling ahead of time
flags = {"xla_force_host_platform_device_count": "8"}  # for shard_map
# Compiling is most of the suite's time, and most programs run once. XLA's older code
# for loops on a CPU compiles in less than half of it; JAX 0.12 has it no more, and its
# XLA passes over the option.
flags["xla_backend_extra_options"] = "xla_cpu_disable_new_fusion_emitters=true"
if platform.machine() in ("x86_64", "AMD64"):
    # No fused multiply-add: LLVM makes them where a product and a sum come to lie in
    # one loop, which is another one in another program, and tests compare their bits.
    flags["xla_cpu_max_isa"] = "AVX"
given = os.environ.get("XLA_FLAGS", "")
more = (f"--{name}={value}" for name, value in flags.items() if name not in given)
os.environ["XLA_FLAGS"] = " ".join([given, *more]).strip()

# XLA's pool has a thread a core: on two, four devices' triangular solves took them all
# and waited for each other for good (jaxlib 0.10.2).
os.environ.setdefault("NPROC", "16")
# XLA's triangular solves are OpenBLAS's, whose threads spin while they wait: for each
# of two workers on two cores they took five times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

CPU_PATHS = ("reference", "xla", "interpret")

# What LLVM makes of XLA's loops on a CPU is not tested either;
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests that too.
if jax.default_backend() == "cpu":
    unless = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", unless != "0")


# Tracing makes many objects and few cycles of them.
gc.set_threshold(100_000, 20, 20)

# Every compiled program maps some pages, and Linux gives a process 65,530 maps: past
# them XLA crashes. A worker of the whole suite gets there.
MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def interruptible():
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def exact_products():
    """Of float32 everywhere: a GPU's own are TF32."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def report(monkeypatch, tmp_path):
    """benchmarks/report.py, of pages and results in a folder of their own."""
    benchmarks = pathlib.Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    found = importlib.import_module("report")
    monkeypatch.setattr(found, "ROOT", tmp_path)
    monkeypatch.setattr(found, "RESULTS", tmp_path / "nvidia_h200")
    for folder in ("docs", "nvidia_h200"):
        (tmp_path / folder).mkdir()
    return found


def pytest_addoption(parser):
    how = "of each test one case for each implementation that it names"
    parser.addoption("--one-case", action="store_true", help=how)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; deselected without")
    large = "takes gigabytes of a GPU; in a process of its own, one at a time"
    config.addinivalue_line("markers", f"large: {large}")
    once = "of what JAX's version does not change; CI runs it on one line of them"
    config.addinivalue_line("markers", f"once: {once}")


@pytest.hookimpl(trylast=True)  # of those that -m leaves
def pytest_collection_modifyitems(config, items):
    left_out = []
    if jax.default_backend() != "gpu":
        left_out = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--one-case"):
        cases, without = {}, {id(item) for item in left_out}
        for item in items:
            if id(item) not in without:
                cases.setdefault(kind_of(item), []).append(item)
        left_out += [item for first, *others in cases.values() for item in others]
    config.hook.pytest_deselected(items=left_out)
    without = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in without]


def kind_of(item):
    """Its function, and implementations among its parameters."""
    call = getattr(item, "callspec", None)
    named = [] if call is None else map(str, call.params.values())
    ways = (name for name in named if name in (*CPU_PATHS, "triton"))
    return item.path, item.originalname, tuple(ways)


ALONE = "GDN_JAX_LARGE_TEST_ALONE"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A worker keeps what memory it once took, and a GPU's is for all of them."""
    if pyfuncitem.get_closest_marker("large") is None or ALONE in os.environ:
        return None
    nodeid = pyfuncitem.nodeid.split("@")[0]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts="]
    command += ["-p", "no:cacheprovider", f"{pyfuncitem.config.rootpath}/{nodeid}"]
    environment = {k: v for k, v in os.environ.items() if "PYTEST" not in k}
    environment |= {ALONE: "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with open(pathlib.Path(tempfile.gettempdir(), "gdn_jax_large.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stdout + run.stderr
    return True


def pytest_generate_tests(metafunc):
    """A test with `path` runs over every implementation: triton on a GPU alone, and the
    reference on one line of JAX. It is plain jax.numpy, and others are compared with it
    on every line."""
    if "path" in metafunc.fixturenames:
        reference, *others = CPU_PATHS
        paths = [
            pytest.param(reference, marks=pytest.mark.once),
            *others,
            pytest.param("triton", marks=pytest.mark.gpu),
        ]
        metafunc.parametrize("path", paths)
