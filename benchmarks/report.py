"""Draws the results files and writes their numbers into the README and the docs:
python benchmarks/report.py

Numbers there stand between markers and come from here alone. A suite without a results
file is left out, and needs no markers until it has one.
"""

import json
import pathlib
import re

import reports.chunked
import reports.conv
import reports.generate
import reports.horizon
import reports.layer
import reports.layer_step
import reports.pinning
import reports.products
import reports.replay
import reports.sharded
import reports.small
import reports.speculate
import reports.trust
import reports.update

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "nvidia_h200"

# Each draws a suite's picture, if it has one, into a folder and returns its tables by
# marker.
REPORTS = {
    "decode": reports.update.decode,
    "verify": reports.update.verify,
    "prefill": reports.chunked.prefill,
    "train": reports.chunked.train,
    "layer": reports.layer.layer,
    "layer_step": reports.layer_step.layer_step,
    "layer_step_replay": reports.layer_step.layer_step_replay,
    "conv": reports.conv.conv,
    "few_rows": reports.products.few_rows,
    "experts": reports.products.experts,
    "small": reports.small.small,
    "replay": reports.replay.replay,
    "schemes": reports.replay.schemes,
    "drift": reports.replay.drift,
    "sharded": reports.sharded.sharded,
    "horizon": reports.horizon.horizon,
    "pinning": reports.pinning.pinning,
    "memcheck": reports.trust.memcheck,
}

# The same for all the files together that a pattern finds in the devices' folders.
REPORTS_OF_SEVERAL = {
    "*/speculate.json": reports.speculate.speculate,
    f"{RESULTS.name}/generate_*.json": reports.generate.generate,
    f"{RESULTS.name}/fuzz*.json": reports.trust.fuzz,
    f"{RESULTS.name}/load*.json": reports.trust.load,
}


def page_of(name: str) -> pathlib.Path:
    """That has the suite's marker; the README if none has."""
    pages = ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))
    marked = (page for page in pages if f"<!-- {name} -->" in page.read_text())
    return next(marked, pages[0])


def splice(path: pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text()
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if not re.search(pattern, page, re.DOTALL):
        raise SystemExit(f"{path} has no {begin} ... {end}")
    new = f"{begin}\n{text}\n{end}"
    path.write_text(re.sub(pattern, lambda _: new, page, flags=re.DOTALL))


def main() -> None:
    paths = {suite: RESULTS / f"{suite}.json" for suite in REPORTS}
    results = {
        suite: json.loads(path.read_text())
        for suite, path in paths.items()
        if path.is_file()
    }
    texts: dict[str, str] = {}
    for suite, result in results.items():
        texts |= REPORTS[suite](result, RESULTS)
    for pattern, report in REPORTS_OF_SEVERAL.items():
        found = sorted(RESULTS.parent.glob(pattern))
        if found:
            texts |= report([json.loads(path.read_text()) for path in found], RESULTS)
    if "decode" in results and "verify" in results:
        texts["first call"] = reports.update.first_call(
            results["decode"], results["verify"]
        )
    for name, text in texts.items():
        splice(page_of(name), name, text)
    print(f"wrote pictures into {RESULTS}, and into pages: {', '.join(texts)}")


if __name__ == "__main__":
    main()
