"""What was looked for and not found: random calls, memory out of bounds, an engine's
faults under load."""

import pathlib

from reports.style import markdown, source

BESIDE = dict(vllm="vLLM's kernel", oracle="float64", reference="its ops in turn")
OUTCOMES = dict(
    passed="that passed",
    failed="that failed",
    unchecked="of which the sanitizer said nothing",
    skipped="that were skipped",
    not_run="for which there was no time",
    left_out="left out: of many gigabytes",
)
# label: name and form, of the same prompts' texts
BY_GENERATE = {
    "texts by `generate`": ("texts", ","),
    "that part from those alone": ("texts_parted_from_alone", ","),
    "largest gap of log-probabilities": ("largest_gap_of_log_probabilities", ".2g"),
}


def fuzz(results: list[dict], folder: pathlib.Path) -> dict[str, str]:
    del folder  # tables alone
    shown = []
    for result in results:
        worst = [
            each["worst"] for row in result["rows"] for each in row["errors"].values()
        ]
        cells = [
            BESIDE[result["against"]],
            calls_of(result),
            str(result["sets"]),
            str(len(result["failures"])),
            f"{max(worst):.2f}" if worst else "-",
        ]
        shown.append((f"`{result['op']}`", cells))
    columns = "beside", "calls", "shapes", "failed", "worst value"
    paragraphs = [
        paragraph for result in results for paragraph in ["", *drawn_of(result)]
    ]
    lines = [*markdown("random calls of", columns, shown), *paragraphs]
    return {"fuzz": "\n".join(lines)}


def calls_of(result: dict) -> str:
    done, asked = (f"{result[name]:,}" for name in ("calls", "asked"))
    return done if done == asked else f"{done} of {asked}"


def drawn_of(result: dict) -> list[str]:
    """What was drawn, what is right, and what was not."""
    absent = [str(row["number"]) for row in result["rows"] if "absent" in row]
    lines = [
        f"`{result['op']}`: {result['inputs']}. Right is: {result['tolerance']}.",
        f"Seed {result['seed']}; {source(result)}",
    ]
    if absent:
        lines.append(f"Not run beside it: shapes {', '.join(absent)}.")
    lines += [
        f"Failed: `{failure['to']}`: {failure['reason']}."
        for failure in result["failures"]
    ]
    return lines


def memcheck(result: dict, folder: pathlib.Path) -> dict[str, str]:
    del folder
    shown = [
        ("errors", [f"{result['errors']:,}"]),
        ("tests collected", [f"{result['collected']:,}"]),
    ]
    shown += [
        (text, [f"{len(result[name]):,}"])
        for name, text in OUTCOMES.items()
        if name == "passed" or result[name]
    ]
    allocator = result["environment"]["XLA_PYTHON_CLIENT_ALLOCATOR"]
    unwatched = result["not_watched"]
    watched = "; ".join(
        f"of {count:,} tests {text}" for text, count in result["watched"].items()
    )
    lines = [
        *planted(result["planted_with"]),
        "",
        *markdown(f"tests that need a GPU, with `{allocator}`", [""], shown),
        "",
        *(f"Not well: `{x}`." for x in (*result["failed"], *result["unchecked"])),
        f"Watched: {watched}.",
        f"Not watched: `{unwatched['kernel']}`. {unwatched['reason']}.",
        "",
        f"compute-sanitizer {result['sanitizer']}; {source(result)}",
    ]
    return {"memcheck": "\n".join(lines)}


def planted(found: dict[str, dict]) -> list[str]:
    """With which allocators it is reported, and with which not; a dash where memcheck
    came to no end."""
    names = next(iter(found.values()))
    rows = []
    for name in names:
        errors = [runs[name]["errors"] for runs in found.values()]
        rows.append((name, ["-" if n is None else f"{n:,}" for n in errors]))
    head = "errors of a kernel that writes past its buffer, with JAX's allocator"
    return markdown(head, [f"`{allocator}`" for allocator in found], rows)


def load(results: list[dict], folder: pathlib.Path) -> dict[str, str]:
    """A column for each run, with drafts or without."""
    del folder
    results = sorted(results, key=lambda result: result["load"]["drafts"])
    cells = list(map(found_under_load, results))
    shown = [(name, [str(each[name]) for each in cells]) for name in cells[0]]
    drafts = [result["load"]["drafts"] for result in results]
    columns = [f"{count} drafts" if count else "plain" for count in drafts]
    sources = zip(columns, map(source, results), strict=True)
    lines = [*markdown("an engine under load", columns, shown), ""]
    lines += [f"At fault: {text}." for text in faults_of(results)]
    lines += [f"Inputs: {results[0]['inputs']}."]
    lines += [f"{column}: {text}" for column, text in sources]
    return {"load": "\n".join(lines)}


def faults_of(results: list[dict]) -> list[str]:
    """A run that came to no verdict, as when it was stopped, is one."""
    unfinished = ["a run that did not come to its end"]
    return [text for result in results for text in result.get("faults", unfinished)]


def found_under_load(result: dict) -> dict[str, object]:
    waves, killed = result["rows"], result.get("killed", {})
    kept = [wave["memory"] for wave in waves[1:]]  # the first one makes programs

    def total(name: str) -> int:
        return sum(wave[name] for wave in waves)

    def growth(name: str) -> str:
        found = [memory[name] for memory in kept if memory[name] is not None]
        return f"{max(found) - found[0]:,}" if found else "-"

    return {
        "rows": result["load"]["rows"],
        "texts": f"{total('texts'):,}",
        "that are not bit for bit those alone": total("texts_not_as_alone"),
        "rows that were not one request's": total("row_faults"),
        "callbacks that raised": total("callbacks_raised"),
        "processes killed": killed.get("kills", 0),
        "faults after them": len(killed.get("faults", ())),
        "bytes by which JAX's arrays grew": growth("live"),
        "bytes by which the device's memory grew": growth("device"),
        "bytes by which the host's grew": growth("host"),
        "tokens/s": f"{total('tokens') / total('seconds'):,.0f}",
        **found_by_generate(result),
    }


def found_by_generate(result: dict) -> dict[str, str]:
    """Nothing of a run that was stopped before."""
    found = result.get("generate", {})
    return {
        label: format(found[name], form) if name in found else "-"
        for label, (name, form) in BY_GENERATE.items()
    }
