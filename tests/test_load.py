"""What benchmarks/load.py looks for holds for a few prompts, and it finds what does
not."""

import importlib
import json
import os
import pathlib

import jax
import pytest
from engines import make

from gdn_jax import models

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("exact_products")]

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
COUNT, ROWS = 60, 4


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = "load", "load_parts", "load_serve", "load_killed"
        yield [importlib.import_module(name) for name in names]


@pytest.fixture(scope="module")
def loaded(modules, tmp_path_factory):
    """(engine, load, texts alone)"""
    load, parts, *_ = modules
    folder = tmp_path_factory.mktemp("model")
    models.save(folder, *make(vocab_size=256))
    small = parts.Load(COUNT, ROWS, prompt=60, new=24, folder=str(folder))
    engine = parts.make_engine(*parts.load_model(small), small)
    return engine, small, load.alone(engine, small)


def test_texts_under_load_are_those_alone(modules, loaded):
    """Bit for bit, whatever runs beside them and whichever callback raises."""
    load, *_ = modules
    rows = list(load.waves(*loaded, seconds=0.0, least=2))
    assert load.verdict(dict(rows=rows, killed=dict(faults=[]))) == []
    assert [row["texts"] for row in rows] == [COUNT, COUNT]
    for row in rows:
        # XLA on a CPU tells of the bytes in use, of which none are more than before
        assert row["live_bytes_between_calls"] == rows[0]["live_bytes_between_calls"]
        assert row["memory"]["live"] == rows[0]["memory"]["live"]


def test_generate_gives_the_same_again(modules, loaded):
    """Behind a callback that raised, of which nothing is left."""
    load, *_ = modules
    found = load.by_generate(*loaded)
    assert found["callback_raised"] and found["texts_with_tokens_given_before"]
    assert found["texts"] == COUNT
    assert found["of_these_not_the_same_again"] == 0
    assert found["live_bytes_left_by_the_raise"] == 0
    assert found["largest_gap_of_log_probabilities"] < 1e-3


def test_a_killed_process_loses_nothing_that_was_given(
    modules, loaded, tmp_path, monkeypatch
):
    """SIGKILL at any moment, and on from what was saved in a new process, which
    compiles as this one does."""
    unless = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", unless)
    killed = modules[3]
    found = killed.kill_and_restore(tmp_path / "killed", *loaded[1:], 1, None)
    assert found["faults"] == []
    assert 0 < found["acknowledged_when_killed"][0] < found["tokens"]


@pytest.mark.parametrize("fault", ["two owners", "leaked", "another's state", "token"])
def test_faults_are_seen(fault, modules, loaded):
    parts, serve = modules[1:3]
    engine = parts.make_engine(loaded[0].model, loaded[0].params, loaded[1])
    watch = serve.Watch()
    requests = [
        engine.submit([65 + i] * (3 + i), max_tokens=24, stop=())
        for i in range(ROWS - 1)
    ]
    watch.submitted = len(requests)
    while not all(request.tokens for request in requests):
        engine.step()
        watch.look(engine)
    assert watch.faults == []
    first, second, _ = requests
    if fault == "two owners":
        engine.running[ROWS - 1] = first
    elif fault == "leaked":  # a text that goes on and is nobody's
        del engine.running[first.row]
    elif fault == "token":
        first.tokens[-1] ^= 1
    else:  # all of two rows of the device, of which the host knows nothing
        order = jax.numpy.array([1, 0, 2, 3])
        assert (first.row, second.row) == (0, 1)
        second.tokens[-1] = first.tokens[-1]  # of which the last is not the difference
        alike = engine.state.token.at[1].set(first.tokens[-1])
        state = engine.state._replace(token=alike)
        engine.state = jax.tree.map(lambda x: x[order], state)
    watch.look(engine)
    assert watch.faults


def test_a_parted_text_is_told(modules, loaded):
    load, parts, *_ = modules
    [asked, *_] = parts.make_asked(loaded[1])
    text = parts.cut(loaded[2][0], asked)
    other = text._replace(log_probabilities=[-9.0, *text.log_probabilities[1:]])
    assert load.differences(text, text) is None
    assert load.differences(text, other)
    wrong = text._replace(tokens=[7, *text.tokens[1:]])
    assert "parts at 0" in load.differences(text, wrong)


def test_the_verdict_is_of_every_part(modules):
    load, *_ = modules
    memory = dict(buffers=3, live=9, device=None, host=5)
    good = dict(
        texts_not_as_alone=0,
        row_faults=0,
        first_faults=[],
        callbacks_raised=4,
        live_bytes_between_calls=[9],
        memory=memory,
    )
    rows = [good | dict(wave=i) for i in range(3)]
    of_generate = dict(
        of_these_not_the_same_again=0,
        live_bytes_left_by_the_raise=0,
        largest_gap_of_log_probabilities=1e-6,
    )
    told = dict(dtype="float32", callback_raised=True) | of_generate
    right = dict(rows=rows, generate=told, killed=dict(faults=[]))
    assert load.verdict(right) == []
    wrong_rows = (
        dict(texts_not_as_alone=1),
        dict(row_faults=1),
        dict(callbacks_raised=0),
        dict(live_bytes_between_calls=[9, 10]),
        dict(memory=memory | dict(live=10)),
        dict(memory=memory | dict(host=5 + 2**26)),
    )
    for change in wrong_rows:
        assert load.verdict(right | dict(rows=[*rows[:2], rows[2] | change]))
    for name in of_generate:
        assert load.verdict(right | dict(generate=told | {name: 1}))
    assert load.verdict(right | dict(generate=told | dict(callback_raised=False)))
    assert load.verdict(right | dict(killed=dict(faults=["one"])))
    assert load.verdict(dict(rows=rows, generate=told))


def test_a_journal_that_says_two_things_is_told(modules, tmp_path):
    killed = modules[3]
    lines = [[0, 0, [[5, -1.0], [6, -2.0]], None], [0, 1, [[6, -2.0]], "length"]]
    path = tmp_path / killed.JOURNAL
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens, reasons, faults, again = killed.read(tmp_path)
    assert tokens == {0: {0: [5, -1.0], 1: [6, -2.0]}} and reasons == {0: "length"}
    assert (faults, again) == ([], 1)
    lines[1][2][0][0] = 7
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert killed.read(tmp_path)[2] == ["token 1 of 0 is another one again"]
