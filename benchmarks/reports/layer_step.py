"""A layer's step between its projections."""

import pathlib

from gdn_jax.ops.layer_step.tuning import Step, find_tuned
from reports.style import absences, markdown, source

NAMES = {
    "fused": "one launch, or two with its norm's",
    "chain": "ops in turn: convolution, rule, norm",
    "fused_update": "the rule alone",
    "vllm_post_conv": "vLLM's rule and norm, no convolution",
}
OF_REPLAY = {
    "fused": "three launches",
    "chain": "ops in turn, four launches",
    "replay_update": "the rule alone, two",
}
TIMES = "span_us", "busy_us"  # of a peer that Python launches there is the second alone


def kind_of(row: dict) -> tuple:
    return row["T"], row["H"], row["HV"], row["state_dtype"]


def taken(row: dict, device_kind: str) -> str:
    """What a layer takes, by the package's table."""
    sizes = (row[key] for key in ("H", "HV", "K", "V", "state_dtype"))
    replay = bool(row.get("replay"))
    step = Step(row["N"], row["T"], row["T"], row["T"] > 1, *sizes, replay)
    tuned = find_tuned(device_kind, step)
    fused = "three launches" if replay else "one launch"
    return fused if tuned is not None and tuned.pays else "ops in turn"


def table(rows: list[dict], device_kind: str, names: dict[str, str]) -> list[str]:
    T, H, HV, dtype = kind_of(rows[0])
    batches = sorted({row["N"] for row in rows})
    shown = []
    for contender, label in names.items():
        found = {row["N"]: row for row in rows if row["contender"] == contender}
        times = {
            N: next((f"{row[key]:.1f}" for key in TIMES if key in row), "-")
            for N, row in found.items()
        }
        shown.append((label, [times.get(N, "-") for N in batches]))
    each = {row["N"]: taken(row, device_kind) for row in rows}
    shown.append(("a layer takes", [each[N] for N in batches]))
    tokens = "one token" if T == 1 else f"verify {T} tokens"
    head = f"us, {tokens}, H={H} HV={HV}, {dtype} state, N ="
    return [*markdown(head, map(str, batches), shown), ""]


def tables(result: dict, names: dict[str, str]) -> str:
    rows, lines = result["rows"], []
    kinds = {kind_of(row) for row in rows}
    for kind in sorted(kinds, key=lambda kind: (kind[:3], kind[3] != "float32")):
        of_kind = [row for row in rows if kind_of(row) == kind]
        lines += table(of_kind, result["device"], names)
    missing = absences(rows, lambda row: f"N = {row['N']}", names.__getitem__)
    return "\n".join([*lines, *missing, source(result)])


def layer_step(result: dict, folder: pathlib.Path) -> dict[str, str]:
    return {"layer_step": tables(result, NAMES)}


def layer_step_replay(result: dict, folder: pathlib.Path) -> dict[str, str]:
    return {"layer_step_replay": tables(result, OF_REPLAY)}
