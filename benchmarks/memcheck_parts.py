"""What memcheck.py finds: a part's results file, and one of all parts'."""

import json
import pathlib
import time
from typing import Any

from common import console, header

OUTCOMES = ("passed", "failed", "skipped", "not_run")  # of a part's tests


class Part:
    """Results, written after every process; `about` is what is known before."""

    def __init__(self, path: pathlib.Path, about: dict[str, Any]):
        self.path, self.begun = path, time.perf_counter()
        self.result = header("those of the tests")
        del self.result["time"]
        self.result |= about | {"seconds": 0.0}
        self.result |= {outcome: [] for outcome in OUTCOMES}
        self.result |= {"errors": 0, "unchecked": [], "reports": []}

    def add(self, chunk: dict[str, Any]) -> None:
        result = self.result
        for test in chunk["tests"]:
            outcome = chunk["ran"].get(test, "not_run")
            result[outcome].append(test)
        if chunk["errors"] is None:  # ended without a summary: nothing is known
            result["unchecked"] += list(chunk["ran"])
        elif not chunk["has_run"] and "failed" not in chunk["ran"].values():
            result["unchecked"] += chunk["tests"]
        result["errors"] += chunk["errors"] or 0
        if chunk.get("output") is not None:
            result["reports"].append(chunk)
        result["seconds"] = round(time.perf_counter() - self.begun, 1)
        self.path.write_text(json.dumps(result, indent=1) + "\n")

    def line(self) -> str:
        names = (*OUTCOMES, "unchecked")
        counts = ", ".join(f"{len(self.result[name])} {name}" for name in names)
        return f"{counts}; {self.result['errors']} errors"


def read_parts(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All of one run, in order."""
    parts = [json.loads(x.read_text()) for x in folder.glob("memcheck_*.json")]
    parts.sort(key=lambda part: int(part["part"].split("/")[0]))
    found = [part["part"] for part in parts]
    if not found or found != [f"{i + 1}/{len(found)}" for i in range(len(found))]:
        raise SystemExit(
            f"--join wants all parts of one count in {folder}; got "
            f"{', '.join(found) or 'none'}. Run those that are missing, and remove "
            f"those of another count."
        )
    names = ("commit", "package", "collected")
    kinds = [{name: part[name] for name in names} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise SystemExit(
            f"--join wants parts of one commit, package and number of tests; got "
            f"{kinds}. Run all of them again."
        )
    return parts


def join(folder: pathlib.Path) -> None:
    """One file of all parts'."""
    whole, *others = read_parts(folder)
    for part in others:
        for name in (*OUTCOMES, "unchecked", "reports", "errors", "seconds"):
            whole[name] += part[name]
        whole["part"] += f", {part['part']}"
    counts = {name: len(whole[name]) for name in (*OUTCOMES, "left_out")}
    if sum(counts.values()) != whole["collected"]:
        raise SystemExit(
            f"--join wants an outcome of each of {whole['collected']} tests; got "
            f"{counts}. Run all parts again, without --quick."
        )
    path = folder / "memcheck.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    console.print(f"{whole['collected']} tests: {counts}; wrote {path}")
