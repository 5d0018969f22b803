"""Whole models against transformers' own, recorded with their checkpoints.

parity_with_transformers.py compares them live, where torch is.
"""

import pathlib

import hf_models
import pytest

FOLDER = pathlib.Path(__file__).parent / "data" / "models"


@pytest.fixture(params=["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def case(request):
    return hf_models.read(FOLDER / request.param)


@pytest.mark.parametrize("run", hf_models.RUNS, ids=lambda run: run.__name__)
def test_every_call_agrees(case, run):
    assert not hf_models.wrong(run(case))


def test_greedy_decoding_agrees(case):
    errors, tokens = hf_models.greedy(case)
    assert not hf_models.wrong(errors)
    assert tokens == case.tokens[0, case.prompt :].tolist()
