"""What of the benchmark of sharing models out runs without GPUs."""

import dataclasses
import functools
import importlib
import itertools
import json
import pathlib

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from gdn_jax import models, sharding, testing

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def work(monkeypatch):
    """The module, with a small model of two layers for each."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("shared_work")
    small = dataclasses.replace(
        found.MODELS["Qwen3.5-27B"],
        vocab_size=512,
        hidden_size=256,
        layer_types=("linear_attention", "full_attention"),
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        intermediate_size=512,
    )
    monkeypatch.setattr(found, "MODELS", {"small": small})
    return found


def test_a_block_runs(work, monkeypatch):
    def make_model(config):
        dtypes = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        return models.Model(config, implementation="xla", **dtypes)

    monkeypatch.setattr(work, "make_model", make_model)
    monkeypatch.setattr(work, "STEPS", 4)
    block = work.Decoding("tensor", "small", 4, 2)
    program = block.lower().compile()
    # Two a layer and the embedding's; the logits'.
    assert block.collectives(program.as_text()) == {"all-reduce": 5, "all-gather": 1}
    run = block.prepare(program)
    run()
    run()
    assert block.figures(2.0) == {"tokens_per_s": 2000.0}


def test_groups_wait_for_each_other_at_a_blocks_end(work, monkeypatch):
    """When the host reads all tokens; in the loop of steps nothing is sent."""
    make = functools.partial(models.Model, implementation="xla")
    monkeypatch.setattr(work, "make_model", make)
    monkeypatch.setattr(work, "STEPS", 4)
    text = work.Decoding("data", "small", 8, 4).lower().compile().as_text()
    _, begin, rest = text.partition("\nENTRY ")
    entry = rest[: rest.index("\n}")]
    assert begin and " while(" in entry and testing.collectives(entry)
    assert testing.collectives(text) == testing.collectives(entry)


def test_an_all_reduce_runs(work):
    call = work.AllReduce(1024, 2)
    program = call.lower().compile()
    assert call.collectives(program.as_text()) == {"all-reduce": call.steps}
    call.prepare(program)()


def test_the_program_of_two_gpus(work, monkeypatch):
    """Kernels on each one's heads, a state that is not copied, and what is sent."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x2", target_config=aot.TARGET.read_text()
    )
    devices = np.array(topology.devices).reshape(1, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
    block = work.Decoding("tensor", "small", 64, 2)
    with jax.sharding.use_abstract_mesh(aot.ABSTRACT_H200):
        lowered = block.lower()
    program = lowered.compile(compiler_options=aot.OPTIMIZED)
    text = program.as_text()
    assert block.collectives(text) == {"all-reduce": 5, "all-gather": 1}
    assert text.count(aot.KERNEL_CALL) >= 10
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(block.state.model))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= state / 2 > memory.temp_size_in_bytes


def test_what_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sharded = importlib.import_module("sharded")

    def all_of(options):
        each = sharded.works(options, 2, False).values()
        return list(itertools.chain.from_iterable(each))

    todo = all_of("default")
    assert len({each.title for each in todo}) == len(todo)
    assert {(x.case, x.gpus) for x in todo} == {
        *[("all_reduce", 2), ("tensor", 1), ("tensor", 2), ("data", 1), ("data", 2)]
    }
    others = all_of("NCCL")
    assert {each.case for each in others} == {"all_reduce", "tensor"}
    assert {each.gpus for each in others} == {2}
    assert list(sharded.works("default", 1, True)) == ["heads on 1"]


def test_rows_of_options_that_there_are_no_more_are_dropped(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sharded = importlib.import_module("sharded")
    about = dict(device="a GPU", commit="told", date="told")
    rows = [
        dict(case="tensor", options=options, gpus=8)
        for options in ("default", "renamed", "NCCL")
    ]
    path = tmp_path / "sharded.json"
    path.write_text(json.dumps(about | dict(rows=rows)))
    begun = sharded.begin_file(about, ["default"], 2, True, tmp_path)
    assert [row["options"] for row in begun["rows"]] == ["default", "NCCL"]


def test_the_report(monkeypatch):
    """Speed-ups, and a larger model's step, of figures made up."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    report = importlib.import_module("report")
    rows = [
        dict(case="tensor", model="Qwen3.5-27B", rows=64, gpus=gpus, ms_a_step=ms)
        | dict(tokens_per_s=64e3 / ms, collectives=sent)
        for gpus, ms, sent in ((1, 20.0, {}), (2, 12.5, {"all-reduce": 129}))
    ]
    rows += [
        dict(case="data", model="Qwen3.5-4B", rows=rows, gpus=gpus, ms_a_step=ms)
        | dict(tokens_per_s=1e3 * rows / ms, collectives={})
        for rows, gpus, ms in ((512, 1, 20.0), (1024, 1, 40.0), (1024, 2, 20.0))
    ]
    rows += [
        dict(case="all_reduce", bytes=size, gpus=2, ms_a_step=us / 1e3, us_each=us)
        | dict(collectives={"all-reduce": 64})
        for size, us in ((8192, 10.0), (655360, 15.0), (2**23, 80.0))
    ]
    result = dict(
        device="a GPU",
        date="2026-01-01",
        commit="0" * 40,
        versions={"jax": "0"},
        copy_tb_per_s=4.0,
        inputs="numbers",
        time="seconds",
        rows=[row | dict(options="default") for row in rows],
    )
    texts = report.REPORTS["sharded"](json.loads(json.dumps(result)), None)
    assert texts.keys() == {"sharded", "layout"}
    assert {report.page_of(name).name for name in texts} == {"sharding.md"}
    table = texts["sharded"]
    assert "| 64 | 2 | default | 12.50 | 5,120 | 1.60 | - | 129 all-reduce |" in table
    assert "| 1024 | 2 | default | 20.00 | 51,200 | 2.00 | 1.00 | - |" in table
    assert "396e9 parameters" in texts["layout"]
    # One sequence: 121 sums between 8 of little more than 10 us each.
    one = next(x for x in texts["layout"].splitlines() if x.startswith("| 1 |"))
    ms, sums = (one.split("|")[i] for i in (4, 6))
    assert 1.15 < float(ms) * float(sums.strip(" %")) / 100 < 1.3
