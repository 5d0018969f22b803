"""`gdn-jax generate`, as a user runs it."""

import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from engines import make
from typer.testing import CliRunner

from gdn_jax import cli, models
from gdn_jax.cli.ctrl_c import Presses
from gdn_jax.cli.rates import Rates
from gdn_jax.generation.requests import Figures

SHORT = ["--max-tokens", "40", "--temperature", "0"]


def generate(*words, text=None):
    return CliRunner().invoke(cli.app, ["generate", *words], input=text)


@pytest.fixture(scope="session")
def plain():
    return generate(*SHORT)


def test_without_arguments_the_shipped_model_writes_documentation(plain):
    assert plain.exit_code == 0
    assert plain.stdout.startswith("def read_") and '"""' in plain.stdout
    figures = r"prefill 9 tokens, [\d,]+/s, decode 39 tokens, [\d,]+/s, 1\.00 tokens"
    assert re.search(figures, plain.stderr)


def test_drafts_change_the_steps_alone(plain):
    drafted = generate("def read_", *SHORT, "--speculative", "3")
    assert drafted.stdout == plain.stdout
    gained = float(re.findall(r"([\d.]+) tokens a step", drafted.stderr)[0])
    assert 2 < gained <= 4


def test_only_newlines_part_prompts():
    text = "a\x0cb\r\n\u2028c\n\n"
    result = generate("--max-tokens", "1", "--rows", "1", "--batch", "-", text=text)
    texts = result.stdout.split("-" * 40 + "\n")[1:]
    assert [text[:3] for text in texts] == ["a\x0cb", "\u2028c" + texts[1][2]]


def test_a_batch_has_the_texts_of_its_prompts(plain):
    result = generate(*SHORT, "--batch", "-", text="class Lock\n\ndef read_\n")
    assert result.exit_code == 0
    first, second = result.stdout.split("-" * 40 + "\n")[1:]
    assert first.startswith("class Lock")
    assert second == plain.stdout


def test_the_seed_decides():
    words = ("def read_", "--max-tokens", "40")
    texts = [generate(*words, "--seed", seed).stdout for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--model", "Qwen/Qwen3.5-4B", "hello"], "hf download"),
        (["--model", str(models.SMALL)], "PROMPT is missing"),
        (["hello", "--batch", "-"], "exclude"),
        (["--batch", "-"], "no prompts"),
        (["--batch", "nowhere"], "there is no file nowhere"),
        (["--batch", str(models.SMALL)], "there is no file"),
        (["--batch", str(models.SMALL / "model.safetensors")], "is no UTF-8"),
        (["--dtype", "int8"], "dtype"),
        (["--dtype", "nothing"], "dtype must be one of float32"),
        (["--top-p", "0"], "'--top-p': 0.0 is not in (0, 1]"),
        ([""], "one token at least"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(words, said):
    result = generate(*words)
    assert result.exit_code in (1, 2)
    # typer's own are in a box as wide as a terminal
    assert said in re.sub(r"[\s│]+", " ", result.stderr)
    assert not result.stdout


def test_calls_that_compile_are_left_out_of_the_rates():
    figures, rates = Figures(), Rates()
    with rates.call(figures):
        figures.prefilled += 30
        jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    assert str(rates.prefill) == "30 tokens" and not rates.decode.tokens
    with rates.call(figures):
        figures.prefilled += 20
        time.sleep(0.01)
    assert rates.prefill.tokens == 50 and rates.prefill.timed == 20
    assert 0.01 <= rates.prefill.seconds < 1


def test_a_checkpoint_that_cannot_draft_says_so(tmp_path):
    model, params = models.load(models.SMALL)
    params.pop("mtp")
    config = dataclasses.replace(model.config, num_mtp_layers=0)
    bare = models.Model(config, param_dtype=model.param_dtype)
    models.save(tmp_path, bare, params)
    result = generate("hello", "--model", str(tmp_path), "--speculative", "2")
    assert result.exit_code == 1 and "MTP" in result.stderr


def test_ctrl_c_between_two_calls_loses_no_text(plain, monkeypatch, interruptible):
    def update(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("rich.status.Status.update", update)
    words = [*SHORT, "--rows", "2", "--batch", "-"]
    result = generate(*words, text="class Lock\ndef read_\nimport\n")
    assert result.exit_code == 130 and "prefill 19 tokens" in result.stderr
    assert "interrupted: 0 of 3 texts are finished" in result.stderr
    first, second = result.stdout.split("-" * 40 + "\n")[1:]  # the third never began
    assert first.startswith("class Lock") and len(first) == len("class Lock") + 2
    assert second[:-1] == plain.stdout[: len("def read_") + 1]


def test_presses_are_told_at_once_and_counted(interruptible):
    told = queue.Queue()
    before = signal.getsignal(signal.SIGINT)
    with Presses(told.put) as presses:
        assert not presses.came
        for count in (1, 2):
            signal.raise_signal(signal.SIGINT)
            assert told.get(timeout=10) == count
        assert presses.came
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# A process that was started in the background ignores Ctrl-C, and so do its children.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gdn_jax import cli
cli.main()
"""
SHOW_CURSOR = b"\x1b[?25h"
ENVIRONMENT = dict(
    FORCE_COLOR="1",  # shows the status, which is for terminals
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    JAX_PLATFORMS="cpu",
    PYTHONUTF8="1",  # whatever the locale: bytes at random are no ASCII
)


def interrupt(words, folder, shown):
    """Runs the command until its stderr shows something, then interrupts it: its exit
    status, what it wrote and what it said."""
    out, err = folder / "out", folder / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "generate", *words],
            env=os.environ | ENVIRONMENT,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        deadline = time.monotonic() + 60
        while not re.search(shown, err.read_bytes()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
    return status, out.read_bytes(), err.read_bytes()


def test_ctrl_c_while_it_compiles_ends_it_at_once(tmp_path):
    begin = time.monotonic()
    status, out, err = interrupt(["def read_"], tmp_path, rb"compiling")
    assert (status, out) == (130, b"") and b"Traceback" not in err
    assert err.endswith(SHOW_CURSOR) and time.monotonic() - begin < 60


def test_ctrl_c_ends_a_batch_with_what_there_is(tmp_path):
    # One recurrent layer and bytes that end no text: quickly compiled, never done.
    layer = dict(layer_types=("linear_attention",), num_mtp_layers=0)
    models.save(tmp_path / "model", *make(vocab_size=256, eos_token_id=(), **layer))
    prompts = tmp_path / "prompts"
    prompts.write_text("def a\nclass Lock\n")
    words = ["--model", tmp_path / "model", "--batch", prompts, "--temperature", "0"]
    words += ["--max-tokens", "10000000"]
    # Of two digits: past the first token of each text.
    status, out, err = interrupt(words, tmp_path, rb"0 of 2 texts, \d\d+ tokens")
    assert status == 130
    assert b"stopping behind the call at hand" in err
    told = re.search(rb"prefill 15 tokens, .* decode (\d+) tokens", err)
    assert told
    # What is no character is written as one of three bytes.
    least = 1 + int(told[1]) // 2
    texts = out.split(b"-" * 40 + b"\n")[1:]
    for text, prompt in zip(texts, (b"def a", b"class Lock"), strict=True):
        assert text.startswith(prompt) and len(text) > len(prompt) + least


def test_a_reader_that_leaves_ends_it_quietly(tmp_path):
    with (tmp_path / "err").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "generate", "--temperature", "0"],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdout.read(1) == b"d"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in (tmp_path / "err").read_bytes()
