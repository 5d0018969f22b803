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
    """All of one run, in order, and behind them what took up their rest."""
    parts = [json.loads(x.read_text()) for x in folder.glob("memcheck_[0-9]*.json")]
    parts.sort(key=lambda part: int(part["part"].split("/")[0]))
    found = [part["part"] for part in parts]
    if not found or found != [f"{i + 1}/{len(found)}" for i in range(len(found))]:
        raise SystemExit(
            f"wanted all parts of one count in {folder}; got "
            f"{', '.join(found) or 'none'}. Run those that are missing, and remove "
            f"those of another count."
        )
    rests = [json.loads(x.read_text()) for x in folder.glob("memcheck_rest_*.json")]
    parts += sorted(rests, key=lambda part: part["date"])
    names = ("commit", "package", "collected")
    kinds = [{name: part[name] for name in names} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise SystemExit(
            f"wanted parts of one commit, package and number of tests; got {kinds}. "
            f"Run all of them again."
        )
    return parts


class Whole:
    """What parts found together: of a test, what the last found that ran it, or that
    it failed once."""

    def __init__(self, parts: list[dict[str, Any]]):
        self.parts = parts
        self.last: dict[str, dict[str, Any]] = {}
        for part in parts:
            for outcome in OUTCOMES:
                for test in part[outcome]:
                    has_failed = self.last.get(test, {}).get("outcome") == "failed"
                    is_news = outcome != "not_run" or test not in self.last
                    if is_news and not has_failed:
                        self.last[test] = {
                            "outcome": outcome,
                            "is_checked": test not in part["unchecked"],
                            "watched": part["watched"],
                        }

    @property
    def allocator(self) -> str:
        return self.parts[0]["environment"]["XLA_PYTHON_CLIENT_ALLOCATOR"]

    @property
    def done(self) -> list[str]:
        """What need not run again."""
        names = ("passed", "skipped")
        return [
            test
            for test, found in self.last.items()
            if found["outcome"] in names and found["is_checked"]
        ]

    @property
    def result(self) -> dict[str, Any]:
        last, parts = self.last.items(), self.parts
        unchecked = [test for test, found in last if not found["is_checked"]]
        reports = [report for part in parts for report in part["reports"]]
        bad = {*unchecked, *(x for x, found in last if found["outcome"] == "failed")}
        return (
            parts[0]
            | {"part": ", ".join(part["part"] for part in parts)}
            | {
                name: sum(part[name] for part in parts)
                for name in ("errors", "seconds")
            }
            | {
                outcome: [x for x, found in last if found["outcome"] == outcome]
                for outcome in OUTCOMES
            }
            | {
                "watched": {
                    text: sum(found["watched"] == text for _, found in last)
                    for text in dict.fromkeys(part["watched"] for part in parts)
                },
                "unchecked": unchecked,
                # of a run that came to no end, whose tests have been run again: none
                "reports": [x for x in reports if x["errors"] or bad & {*x["tests"]}],
            }
        )


def join(folder: pathlib.Path) -> None:
    """One file of all parts'."""
    whole = Whole(read_parts(folder)).result
    counts = {name: len(whole[name]) for name in (*OUTCOMES, "left_out")}
    if sum(counts.values()) != whole["collected"]:
        raise SystemExit(
            f"--join wants an outcome of each of {whole['collected']} tests; got "
            f"{counts}. Run all parts again, without --quick."
        )
    path = folder / "memcheck.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    console.print(f"{whole['collected']} tests: {counts}; wrote {path}")
