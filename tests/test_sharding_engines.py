"""Engines that devices share out, and those of two processes."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import engines
import jax
import pytest
from meshes import KINDS, assert_lie_at, mesh_of, shared_of

from gdn_jax import Engine, _trees
from gdn_jax.generation.api import make_engine
from gdn_jax.generation.prompts import next_pieces
from gdn_jax.generation.requests import make_request
from gdn_jax.generation.sizes import Sizes
from gdn_jax.models import ShardedModel

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize(("data", "model", "drafts"), [(2, 2, 2), (1, 2, 0)])
def test_engine(data, model, drafts):
    shared, params = shared_of("dense", data, model)
    whole, own = engines.make(**KINDS["dense"])
    found = []
    for each, variables in ((shared, params), (whole, own)):
        engine = Engine(each, variables, **engines.SIZES, speculative=drafts)
        options = engines.MIXED if not drafts else None
        requests = engines.write(
            engine, engines.PROMPTS, options, **dict(max_tokens=9, stop=())
        )
        found.append((engines.tokens(requests), engine.figures))
    assert found[0][0] == found[1][0]
    assert found[0][1].prefilled == found[1][1].prefilled


def on_one_device():
    return sum(len(x.sharding.device_set) == 1 for x in jax.live_arrays())


@pytest.mark.parametrize(("data", "model", "drafts"), [(1, 2, 0), (2, 2, 2)])
def test_an_engine_is_restored(data, model, drafts, tmp_path, monkeypatch):
    """Each array goes from the host to where it lies; none is on one device first."""
    shared, params = shared_of("dense", data, model)
    engine = Engine(shared, params, **engines.SIZES, speculative=drafts)
    request = engine.submit(engines.PROMPTS[0], max_tokens=40, stop=())
    for _ in range(2):
        engine.step()
    engine.save(tmp_path / "engine")
    like, whole = _trees._like, []

    def watched(got, *args):
        alone = on_one_device()
        whole.append(like(got, *args))
        assert on_one_device() == alone
        return whole[-1]

    monkeypatch.setattr(_trees, "_like", watched)
    restored = Engine.restore(tmp_path / "engine", shared, params)
    for x in (engine.state, restored.state):
        assert_lie_at(x, shared.shardings(x))
    assert whole and all(
        x is y for x, y in zip(whole, jax.tree.leaves(restored.state), strict=True)
    )
    [again] = restored.requests
    for each in (engine, restored):
        engines.finish(each)
    assert again.tokens == request.tokens
    whole, own = engines.make(**KINDS["dense"])
    with pytest.raises(ValueError, match="parts is None, was 2"):
        Engine.restore(tmp_path / "engine", whole, own)


def test_each_group_reads_prompts():
    """As many tokens a call as an engine of its rows alone."""
    sizes = Sizes(8, 64, 0, 4, prefill_tokens=32, max_stop=1, recurrent_dtype="float32")
    one = dict(max_tokens=4, config=engines.make()[0].config, sizes=sizes)
    others = dict(temperature=0.0, top_p=1.0, top_k=0, seed=0, stop=())
    reading = []
    for row in range(8):
        reading.append(make_request(row, prompt=[1] * 16, **others, **one))
        reading[row].row = row
    _, prompts = next_pieces(reading, sizes, 4)
    assert prompts.rows.tolist() == [*range(8)]
    _, prompts = next_pieces(reading, sizes, 2)
    assert prompts.rows.tolist() == [0, 1, 4, 5]
    _, prompts = next_pieces(reading, sizes)
    assert prompts.rows.tolist() == [0, 1]


def test_generate_takes_a_row_for_each_group():
    """However few prompts there are."""
    shared, params = shared_of("dense", 4, 2)
    engine = make_engine(shared, params, engines.PROMPTS[:1], max_tokens=5, drafts=0)
    assert engine.sizes.num_rows == 4


PROCESS = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
jax.config.update("jax_disable_most_optimizations", True)
import engines
import numpy as np
from jax.sharding import AxisType, Mesh
from gdn_jax.models import ShardedModel
from gdn_jax import Engine
first, second, third, fourth = jax.devices()  # two of each process
devices = np.array([[first, third], [fourth, second]])
mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
model, params = engines.make(num_mtp_layers=0)
shared = ShardedModel(model, mesh)
params = shared.shard(params)
restored = Engine.restore(sys.argv[3], shared, params)
again = restored.requests
engines.finish(restored)
engine = Engine(shared, params, **engines.SIZES)
texts = engines.tokens(
    engines.write(engine, engines.PROMPTS, engines.MIXED, **dict(max_tokens=9, stop=()))
)
try:
    engine.save("nowhere")
except NotImplementedError as error:
    print("TEXTS", json.dumps([texts, engines.tokens(again), str(error)]))
"""


def test_two_processes(tmp_path):
    """On JAX's own runtime: both axes of the mesh go from one to the other. They go on
    with what one process has saved, too."""
    if jax.default_backend() != "cpu":
        pytest.skip("they are compared with this one, on CPUs")
    options = dict(max_tokens=9, stop=())
    model, params = engines.make(num_mtp_layers=0)
    shared = ShardedModel(model, mesh_of(2, 2))
    engine = Engine(shared, shared.shard(params), **engines.SIZES)
    begun = [engine.submit(prompt, **options) for prompt in engines.PROMPTS[:3]]
    while not engines.tokens(begun)[0]:
        engine.step()
    engine.save(tmp_path / "engine")
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    flags = re.sub(r"device_count=\d+", "device_count=2", os.environ["XLA_FLAGS"])
    folder = pathlib.Path(__file__).parent
    paths = [str(folder), *map(str, filter(None, sys.path))]
    env = os.environ | dict(XLA_FLAGS=flags, PYTHONPATH=os.pathsep.join(paths))
    env |= dict(JAX_PLATFORMS="cpu")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number), tmp_path / "engine"],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    texts = []
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-4000:]
        [line] = [line for line in out.splitlines() if line.startswith("TEXTS ")]
        texts.append(json.loads(line.removeprefix("TEXTS ")))
    engines.finish(engine)
    engine = Engine(model, params, **engines.SIZES)
    want = engines.write(engine, engines.PROMPTS, engines.MIXED, **options)
    for got, again, error in texts:
        assert got == engines.tokens(want)
        assert again == engines.tokens(begun)
        assert "other processes' devices too cannot be saved" in error
