"""`gdn-jax generate`, as a user runs it."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from engines import make
from typer.testing import CliRunner

from gdn_jax import models
from gdn_jax.cli import generating
from gdn_jax.cli.commands import app

WEIGHTS = models.SMALL / "model.safetensors"
SHORT = ["--max-tokens", "40", "--temperature", "0"]

# Tests of an option that compile the shipped model for it are for one line of JAX: on
# every line test_engine.py and test_layer.py have the option of small models.


def generate(*words, text=None):
    return CliRunner().invoke(app, ["generate", *words], input=text)


@pytest.fixture(scope="session")
def plain():
    return generate(*SHORT)


def test_without_arguments_the_shipped_model_writes_documentation(plain):
    assert plain.exit_code == 0
    assert plain.stdout.startswith("def read_") and '"""' in plain.stdout
    figures = r"prefill 9 tokens, [\d,]+/s, decode 39 tokens, [\d,]+/s, 1\.00 tokens"
    assert re.search(figures, plain.stderr)


@pytest.mark.once
@pytest.mark.parametrize("decode", [[], ["--decode", "replay"]])
def test_drafts_change_the_steps_alone(decode, plain):
    drafted = generate("def read_", *SHORT, "--speculative", "3", *decode)
    assert drafted.stdout == plain.stdout
    gained = float(re.findall(r"([\d.]+) tokens a step", drafted.stderr)[0])
    assert 2 < gained <= 4


def test_only_newlines_part_prompts():
    text = "a\x0cb\r\n\u2028c\n\n"
    result = generate("--max-tokens", "1", "--rows", "1", "--batch", "-", text=text)
    texts = result.stdout.split("-" * 40 + "\n")[1:]
    assert [text[:3] for text in texts] == ["a\x0cb", "\u2028c" + texts[1][2]]


@pytest.mark.once
def test_a_batch_has_the_texts_of_its_prompts(plain):
    result = generate(*SHORT, "--batch", "-", text="class Lock\n\ndef read_\n")
    assert result.exit_code == 0
    first, second = result.stdout.split("-" * 40 + "\n")[1:]
    assert first.startswith("class Lock")
    assert second == plain.stdout


@pytest.mark.once
def test_the_seed_decides():
    words = ("def read_", "--max-tokens", "40")
    texts = [generate(*words, "--seed", seed).stdout for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere"], "--model nowhere: there is no such folder"),
        (["--model", "a/b-1.5"], "`hf download a/b-1.5 --local-dir FOLDER`"),
        (["--model", __file__, "hello"], "no such folder"),
        (["--model", str(models.SMALL)], "PROMPT is missing"),
        (["hello", "--batch", "-"], "exclude"),
        (["--batch", "-"], "no prompts"),
        (["--batch", "nowhere"], "--batch nowhere: No such file or directory. Wanted:"),
        (["--batch", str(models.SMALL)], ": Is a directory. Wanted: UTF-8 text with"),
        (["bad \udcff byte"], "PROMPT is no UTF-8 (surrogates not allowed at 4)."),
        (["--batch", str(WEIGHTS)], "Not in UTF-8. Wanted: UTF-8 text with a prompt"),
        ([""], "one token at least"),
        (
            ["x", "--speculative", "3", "--decode", "in_place"],
            "use checkpoints or replay.",
        ),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(words, said):
    result = generate(*words)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not result.stdout


def test_a_closed_pipe_ends_it_quietly(monkeypatch):
    def load(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(generating, "_load", load)
    result = generate("hello")
    assert (result.exit_code, result.output) == (1, "")


def test_a_mark_of_the_byte_order_is_no_text(tmp_path):
    (tmp_path / "prompts").write_bytes(b"\xef\xbb\xbfdef a\n")
    result = generate("--max-tokens", "1", "--batch", str(tmp_path / "prompts"))
    assert "prefill 5 tokens" in result.stderr


def test_a_broken_model_is_told(tmp_path):
    model, params = models.load(models.SMALL, dtype="float32", progress=False)
    params["norm"]["weight"] = params["norm"]["weight"].at[0].set(jnp.nan)
    models.save(tmp_path, model, params)
    result = generate("def read_", "--model", str(tmp_path), *SHORT)
    assert result.exit_code == 1 and "logits are no numbers" in result.stderr
    assert result.stdout == "def read_\n"


@pytest.mark.once
def test_float16_runs_on_a_cpu(monkeypatch):
    load, dtypes = models.load, []

    def loaded(*args, **options):
        model, params = load(*args, **options)
        dtypes.append(model.dtype)
        return model, params

    monkeypatch.setattr(models, "load", loaded)
    result = generate("def read_", *SHORT, "--dtype", "float16")
    assert dtypes == [jnp.float16]
    assert result.exit_code == 0 and len(result.stdout) > len("def read_")


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
    result = generate(*SHORT, "--batch", "-", text="class Lock\ndef read_\n")
    assert result.exit_code == 130 and "prefill 19 tokens" in result.stderr
    assert "interrupted: 0 of 2 texts finished" in result.stderr
    first, second = result.stdout.split("-" * 40 + "\n")[1:]
    assert first.startswith("class Lock") and len(first) == len("class Lock") + 2
    assert second[:-1] == plain.stdout[: len("def read_") + 1]


def test_after_ctrl_c_texts_that_never_began_are_not_shown(monkeypatch, interruptible):
    def update(_, text):
        if text.startswith("1 of 3"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("rich.status.Status.update", update)
    words = ["--max-tokens", "10", "--temperature", "0", "--rows", "1", "--batch", "-"]
    result = generate(*words, text="def read_\nclass Lock\ndef a\n")
    assert result.exit_code == 130
    [shown] = result.stdout.split("-" * 40 + "\n")[1:]
    assert shown.startswith("def read_")
    assert "interrupted: 1 of 3 texts finished" in result.stderr
    assert "unfinished" not in result.stderr


# A process that was started in the background ignores Ctrl-C, and so do its children.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gdn_jax import cli
cli.main()
"""
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
    status, out, err = interrupt(["def read_"], tmp_path, rb"compiling")
    assert (status, out) == (130, b"")
    assert b"Traceback" not in err and b"press again" not in err


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
    told = re.search(rb"prefill 15 tokens, .* decode (\d+) tokens", err)
    assert told
    assert b"press again to stop at once" in err
    for number in (b"1", b"2"):
        assert b"[text " + number + b" is unfinished]" in err
    # What is no character is written as one of three bytes.
    least = 1 + int(told[1]) // 2
    texts = out.split(b"-" * 40 + b"\n")[1:]
    for text, prompt in zip(texts, (b"def a", b"class Lock"), strict=True):
        assert text.startswith(prompt) and len(text) > len(prompt) + least
