"""The pages that benchmarks/report.py writes results into."""

import importlib
import json
import pathlib

import pytest

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def _result(rows):
    versions = {"jax": "0"}
    header = dict(device="a GPU", date="2026-01-01", commit="0" * 40)
    return header | dict(versions=versions, copy_tb_per_s=4.0, rows=rows)


def test_a_source_names_every_commit(monkeypatch):
    """Of the rows; that of the file where rows name none."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    source = importlib.import_module("reports.style").source
    own = "a GPU, JAX 0, 2026-01-01, commit 0000000000; a copy moves 4.00 TB/s."
    late = dict(commit="1" * 40, date="2026-01-02T09:00")
    early = dict(commit="2" * 40, date="2025-12-31T09:00")
    assert source(_result([])) == source(_result([{}, {}])) == own
    assert "JAX 0, 2026-01-02, commit 1111111111;" in source(_result([late, late]))
    assert "2026-01-01 to 2026-01-02, commits 0000000000, 1111111111;" in source(
        _result([late, {}])
    )
    of_three = source(_result([late, early, {}, early]))
    assert "JAX 0, 2025-12-31 to 2026-01-02, commits 2222222222, 0000000000, " in (
        of_three
    )


def test_the_convolutions_table_holds_what_was_measured(report):
    plain = dict(N=8, T=1, S=1, lengths=[])
    time = dict(median_us=2.0, tb_per_s=3.0)
    rows = [
        plain | time | dict(contender="triton"),
        plain | time | dict(contender="triton tokens=1", median_us=1.0),
        plain | dict(contender="vllm_conv_update", absent="not here"),
        plain | time | dict(contender="triton", T=4, S=4, lengths=[4] * 8),
        plain | time | dict(contender="xla", N=2, T=9, lengths=[9, 9]),
    ]
    [(marker, text)] = report.REPORTS["conv"](_result(rows), None).items()
    assert marker == "conv"
    assert "| gdn_jax | 2.0 |" in text and "75%" in text
    assert "vLLM is absent: not here" in text
    assert "| 8, packed |" in text and "| 2 ragged, 18 in all |" in text
    assert "tokens=1" not in text and "1.0" not in text


def _drafts(drafts, tokens_per_s, **others):
    row = dict(rows=1, temperature=0.0, drafts=drafts, tokens_per_s=tokens_per_s)
    return row | dict(mean_accepted=1.0 + drafts / 2) | others


def test_tables_of_all_devices_that_have_results(report, monkeypatch, tmp_path):
    """The fastest first; what has no results file needs no marker."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "gpu")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speculate -->\nold\n<!-- /speculate -->\nafter\n")
    report.main()
    assert "old" in readme.read_text()
    plain = _drafts(0, 100.0, min_tokens_per_s=90.0, max_tokens_per_s=150.0)
    sampled = _drafts(0, 7.0, rows=8, temperature=1.0)
    files = {
        "a_cpu": [plain, _drafts(2, 125.0), sampled],
        "gpu": [_drafts(0, 3000.0), _drafts(3, 4500.0)],
    }
    for folder, rows in files.items():
        (tmp_path / folder).mkdir()
        result = {k: v for k, v in _result(rows).items() if k != "copy_tb_per_s"}
        result["device"] = f"the {folder}"
        (tmp_path / folder / "speculate.json").write_text(json.dumps(result))
    report.main()
    text = readme.read_text()
    assert text.startswith("before\n<!-- speculate -->\n| tokens/s")
    assert text.endswith("<!-- /speculate -->\nafter\n") and "old" not in text
    gpu, cpu = text.split("the gpu,")
    assert "| 1 text, greedy | 3,000 | 4,500 (1.50; 2.50) |" in gpu
    assert "| 1 text, greedy | 100 | 125 (1.25; 2.00) |" in cpu
    assert "| 8 texts at once, temperature 1 | 7 | - |" in cpu
    assert "0.90 to 1.50 times" in cpu and "times their medians" not in gpu


def _step(rows, drafts, ms, update="fused", **others):
    tokens = 1 + drafts / 2
    row = dict(model="A", rows=rows, drafts=drafts, state_dtype="float32")
    row |= dict(update=update, ms_a_step=ms, ms_a_token=ms / tokens, floor_ms=4.0)
    row |= dict(kernels_ms_a_step=0.9 * ms, update_share=0.25, saved_us_a_layer=-0.5)
    row |= dict(gigabytes=dict(weights=9.0), tokens_per_s=1e3 * rows * tokens / ms)
    return row | others


def test_a_table_of_each_model_that_was_decoded(report, tmp_path):
    """The smallest first, with what it has no room for, and one picture."""
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generate -->\n<!-- /generate -->")
    no_room = dict(model="A", rows=64, drafts=3, state_dtype="float32")
    rows = [
        _step(8, 0, 5.0),
        _step(8, 0, 7.0, update="unfused"),
        _step(8, 0, 3.0, state_dtype="bfloat16"),
        _step(8, 1, 11.0),
        _step(8, 3, 10.0),
        _step(64, 0, 16.0, commit="0123456789abcdef"),
        no_room | dict(update="fused", absent="9 of 8 GB"),
    ]
    small = _step(1, 0, 2.0, model="B", gigabytes=dict(weights=1.0))
    for name, of_model in dict(a=rows, b=[small]).items():
        times = dict(time="wall clock", inputs="normal weights")
        path = tmp_path / "nvidia_h200" / f"generate_{name}.json"
        path.write_text(json.dumps(_result(of_model) | times))
    report.main()
    assert (tmp_path / "nvidia_h200" / "generate.png").is_file()
    first, second = readme.read_text().split("| A, float32 state, N = | 8 | 64 |")
    assert "| B, float32 state, N = | 1 |" in first
    assert "| plain, ms a token | 2.00 (0.50) |" in first
    assert "| plain, ms a token | 5.00 (1.25) | 16.00 (4.00) |" in second
    assert "| 3 drafts, ms a token | 4.00 (2.50) | - |" in second
    assert "| 3 drafts, tokens/s | 2,000 | - |" in second
    assert "| plain, us saved a layer | -0.5 | -0.5 |" in second
    assert "Of commit 0123456789: plain, N = 64." in second
    assert "Absent: 3 drafts, N = 64, which needs 9 of 8 GB." in second
    assert "7.00" not in second and "3.00" not in second and "1 draft" not in second


def test_parts_of_a_token_are_its_time(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    generate = importlib.import_module("reports.generate")
    row = _step(8, 3, 10.0)  # 2.5 tokens
    assert generate.parts_of(row) == pytest.approx([0.9, 2.7, 0.4])
    longer = row | dict(kernels_ms_a_step=12.0)
    assert sum(generate.parts_of(longer)) == pytest.approx(row["ms_a_token"])


FEW_ROWS = dict(name="out", L=8, D=64, columns=[32, 16])
EXPERTS = dict(model="A", product="down", N=8, E=16, k=2, D=64, F=32)


@pytest.mark.parametrize(
    ("suite", "problem", "other", "product"),
    [
        ("few_rows", FEW_ROWS, dict(L=64), "out, 64 x 48"),
        ("experts", EXPERTS, dict(N=64), "A (2 of 16 experts), down, 64 x 32"),
    ],
)
def test_a_products_table_has_ours_above_xlas(suite, problem, other, product, report):
    [count] = other
    time = dict(median_us=2.0, tb_per_s=3.0)
    rows = [
        problem | time | dict(contender="triton"),
        problem | time | dict(contender="triton num_warps=4", median_us=1.0),
        problem | dict(contender="xla", median_us=4.0, tb_per_s=1.5),
        problem | other | time | dict(contender="triton", median_us=6.0),
        problem | other | dict(contender="xla", absent="it does not fit"),
    ]
    [(marker, text)] = report.REPORTS[suite](_result(rows), None).items()
    assert marker == suite
    assert f"bandwidth), {count} = | 8 | 64 |" in text
    ours, xla = f"| {product}: gdn_jax |", f"| {product}: XLA |"
    assert f"{ours} 2.0 (75%) | 6.0 (75%) |\n{xla} 4.0 (38%) | - |" in text
    assert f"XLA is absent at {product}, {count} = 64: it does not fit" in text
    assert "num_warps" not in text and " 1.0 " not in text


def test_a_layers_step_is_told_with_what_a_layer_takes(report):
    """By the package's table: few rows at once, many by the ops in turn."""
    size = dict(T=1, H=16, HV=32, K=128, V=128, state_dtype="float32")
    rows = [
        size | dict(N=8, contender="fused", span_us=12.0, busy_us=13.0),
        size | dict(N=8, contender="chain", span_us=14.0, busy_us=15.0),
        size | dict(N=8, contender="vllm_post_conv", busy_us=16.0),
        size | dict(N=64, contender="fused", span_us=79.0, busy_us=80.0),
        size | dict(N=64, contender="vllm_post_conv", absent="not here"),
    ]
    result = _result(rows) | dict(device="NVIDIA H200")
    [(marker, text)] = report.REPORTS["layer_step"](result, None).items()
    assert marker == "layer_step"
    assert "| us, one token, H=16 HV=32, float32 state, N = | 8 | 64 |" in text
    assert "| one launch, or two with its norm's | 12.0 | 79.0 |" in text
    assert "| ops in turn: convolution, rule, norm | 14.0 | - |" in text
    assert "no convolution | 16.0 | - |" in text
    assert "| a layer takes | one launch | ops in turn |" in text
    assert "vLLM's rule and norm, no convolution is absent at N = 64: not here" in text

    rows = [row | dict(replay=True) for row in rows if row["contender"] == "fused"]
    rows.append(rows[0] | dict(contender="replay_update", span_us=9.0))
    result["rows"] = rows
    [(marker, text)] = report.REPORTS["layer_step_replay"](result, None).items()
    assert marker == "layer_step_replay"
    assert "| three launches | 12.0 | 79.0 |" in text
    assert "| the rule alone, two | 9.0 | - |" in text


def _told(rows, **others):
    told = _result(rows) | dict(inputs="normal", **others)
    del told["copy_tb_per_s"]
    return told


def _fuzzed(op, against, rows, **others):
    counts = dict(seed=7, asked=3000, calls=3000, sets=len(rows), failures=[])
    return _told(rows, op=op, against=against, tolerance="near", **counts | others)


def test_random_calls_are_told_with_what_failed(report, tmp_path):
    """Op by op, of all files that there are, where the page has the marker."""
    page = tmp_path / "docs" / "trust.md"
    page.write_text("<!-- fuzz -->\nnot yet\n<!-- /fuzz -->\n")
    (tmp_path / "README.md").write_text("")
    report.main()
    assert "not yet" in page.read_text()

    def errors(worst):
        return dict(state=dict(rms=1e-7, worst=worst), out=dict(rms=1e-3, worst=0.5))

    rows = [dict(number=0, errors=errors(0.25)), dict(number=1, errors=errors(0.75))]
    rows.append(dict(number=2, errors={}, absent="no such K"))
    fault = dict(
        case=5, reason="state deviates", to="python benchmarks/fuzz.py --case 5"
    )
    files = dict(
        fuzz=_fuzzed("fused_update", "vllm", rows),
        fuzz_replay_update=_fuzzed(
            "replay_update", "oracle", rows[:1], calls=20, failures=[fault]
        ),
    )
    for name, result in files.items():
        (tmp_path / "nvidia_h200" / f"{name}.json").write_text(json.dumps(result))
    report.main()
    text = page.read_text()
    assert "| `fused_update` | vLLM's kernel | 3,000 | 3 | 0 | 0.75 |" in text
    assert "| `replay_update` | float64 | 20 of 3,000 | 1 | 1 | 0.50 |" in text
    assert "Not run beside it: shapes 2.\n" in text
    assert "Failed: `python benchmarks/fuzz.py --case 5`: state deviates." in text
    assert "`fused_update`: normal. Right is: near.\nSeed 7; a GPU, JAX 0," in text


def test_what_memcheck_found_is_told_with_what_it_did_not_see(report):
    planted = {"none": dict(errors=0), "one value": dict(errors=1)}
    missed = planted | {"one value": dict(errors=0)}
    silent = planted | {"none": dict(errors=None)}
    tests = dict(passed=["a"] * 1200, failed=["b"], unchecked=[], not_run=["c", "d"])
    tests |= dict(skipped=["e"], left_out=["f"], collected=1205)
    about = dict(sanitizer="Version 1", planted=planted, errors=4)
    about |= dict(planted_with=dict(pool=missed, own=planted, late=silent))
    about |= dict(environment=dict(XLA_PYTHON_CLIENT_ALLOCATOR="own"))
    about |= dict(not_watched=dict(kernel="k", reason="It reads past its end"))
    about |= dict(watched={"all": 1200, "ours": 1})
    result = _told([], **tests, **about)
    [(marker, text)] = report.REPORTS["memcheck"](result, None).items()
    assert marker == "memcheck"
    assert "with JAX's allocator | `pool` | `own` | `late` |\n" in text
    assert "| none | 0 | 0 | - |\n| one value | 0 | 1 | 1 |\n\n" in text
    assert "| tests that need a GPU, with `own` |  |\n" in text
    assert "| errors | 4 |\n| tests collected | 1,205 |" in text
    assert "| that passed | 1,200 |\n| that failed | 1 |" in text
    assert "| that were skipped | 1 |\n| for which there was no time | 2 |" in text
    assert "| left out: of many gigabytes | 1 |" in text
    assert "Watched: of 1,200 tests all; of 1 tests ours.\n" in text
    assert "Not watched: `k`. It reads past its end.\n" in text
    assert "said nothing" not in text and "Not well: `b`." in text
    assert "compute-sanitizer Version 1; a GPU, JAX 0, 2026-01-01" in text


def _wave(live, **others):
    row = dict(texts=2000, tokens=9000, seconds=3.0, callbacks_raised=2)
    memory = dict(buffers=9, live=live, device=None, host=100 + live)
    row |= dict(texts_not_as_alone=0, row_faults=0, memory=memory)
    return row | others


def test_a_load_is_told_plain_and_with_drafts(report):
    """Memory from the second wave on; a run without a verdict is no good one."""
    waves = [_wave(5), _wave(7), _wave(7)]
    killed = dict(kills=2, faults=[])
    generated = dict(texts=2000, texts_parted_from_alone=132)
    generated |= dict(largest_gap_of_log_probabilities=0.1147)
    whole = dict(load=dict(rows=64, drafts=0), killed=killed, faults=[])
    whole |= dict(generate=generated)
    stopped = dict(load=dict(rows=64, drafts=3))
    wrong = [_wave(5, texts_not_as_alone=1), _wave(5), _wave(8)]
    [suite] = [each for each in report.REPORTS_OF_SEVERAL if "load" in each]
    of_both = [_told(wrong, **stopped), _told(waves, **whole)]
    [(marker, text)] = report.REPORTS_OF_SEVERAL[suite](of_both, None).items()
    assert marker == "load"
    assert "| an engine under load | plain | 3 drafts |" in text
    assert (
        "| texts | 6,000 | 6,000 |" in text and "| tokens/s | 3,000 | 3,000 |" in text
    )
    assert "| that are not bit for bit those alone | 0 | 1 |" in text
    assert "| processes killed | 2 | 0 |" in text
    assert "| bytes by which JAX's arrays grew | 0 | 3 |" in text
    assert "| bytes by which the device's memory grew | - | - |" in text
    assert "| texts by `generate` | 2,000 | - |" in text
    assert "| that part from those alone | 132 | - |" in text
    assert "| largest gap of log-probabilities | 0.11 | - |" in text
    assert "\nplain: a GPU, JAX 0," in text and "\n3 drafts: a GPU, JAX 0," in text
    assert text.count("At fault: ") == 1 and "did not come to its end" in text


def test_a_pinned_launch_is_the_one_that_loses_least(report):
    def cost(dtype, launch, **by_batch):
        return dict(state_dtype=dtype, launch=f"pinned: {launch}", by_batch=by_batch)

    costs = [cost("float32", "A", a=1.0, b=1.25), cost("float32", "B", a=2.0, b=1.0)]
    costs.append(cost("bfloat16", "C", b=1.125))
    result = _told([], costs=costs)
    [(marker, text)] = report.REPORTS["pinning"](result, None).items()
    assert marker == "pinning" and "each batch's own | a | b |" in text
    assert "| float32 state, A | 1.00 | 1.25 |" in text and "B" not in text
    assert "| bfloat16 state, C | - | 1.12 |" in text


def test_pages_have_what_is_reported_of_them():
    docs = BENCHMARKS.parent / "docs"
    pages = dict(fuzz="trust", memcheck="trust", load="trust", pinning="numerics")
    for name, page in pages.items():
        text = (docs / f"{page}.md").read_text()
        assert text.index(f"<!-- {name} -->") < text.index(f"<!-- /{name} -->")
