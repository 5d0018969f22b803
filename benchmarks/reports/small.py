"""The shipped model: its loss curve, and its bits per byte beside the baseline's.

small.json is the curve.json that its run left, with the date and the commit beside.
"""

import json
import pathlib
from itertools import cycle

import matplotlib.pyplot as plt

from reports.style import WIDTH

HELD_OUT = pathlib.Path(__file__).parents[1] / "results" / "held_out.json"
ORDER = 6
# Of the next byte and of drafts: Okabe and Ito's colours, and a dash for each.
LOOKS = ("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-."), ("#CC79A7", ":")


def small(result: dict, folder: pathlib.Path) -> dict[str, str]:
    baseline = json.loads(HELD_OUT.read_text())
    if result["sha256"] != [baseline[p]["sha256"] for p in ("train", "held_out")]:
        raise SystemExit("the shipped model and held_out.json are of different texts")
    bits = {
        row["discounts"]: row["bits_per_byte"]
        for row in baseline["kneser_ney"]
        if row["order"] == ORDER
    }
    plot(result, bits["modified"], folder / "small.png")
    rows = [
        ("the shipped model", result["held_out_bits_per_byte"]),
        *(
            (f"Kneser-Ney, order {ORDER}, {name} discounts", x)
            for name, x in bits.items()
        ),
    ]
    recipe = result["recipe"]
    lines = [
        f"| bits per byte of {baseline['held_out']['bytes']:,} held-out bytes | |",
        "| --- | ---: |",
        *(f"| {name} | {x:.3f} |" for name, x in rows),
        "",
        f"Text of Python {result['python']}, {baseline['train']['bytes']:,} bytes to "
        f"train on; {recipe['steps']} steps of {recipe['batch']} windows of "
        f"{recipe['length']} bytes in {result['dtype']} (`--dtype {result['dtype']}`), "
        f"seed {recipe['seed']}, on an {result['device']}; held-out text in float32.",
    ]
    return {"small": "\n".join(lines)}


def plot(result: dict, baseline: float, path: pathlib.Path) -> None:
    points = result["points"]
    steps = [point["step"] for point in points]
    figure, axis = plt.subplots(figsize=(WIDTH, 4))
    losses = [[point["next"], *point["drafts"]] for point in points]
    labels = ["next byte", *(f"draft {i}" for i in range(1, len(losses[0])))]
    curves = zip(labels, zip(*losses, strict=True), strict=True)
    for (label, values), (colour, dash) in zip(curves, cycle(LOOKS), strict=False):
        axis.plot(steps, values, label=label, color=colour, linestyle=dash)
    held_out = result["held_out_bits_per_byte"]
    axis.axhline(held_out, color="black", label=f"held out, {held_out:.3f}")
    label = f"Kneser-Ney, held out, {baseline:.3f}"
    axis.axhline(baseline, color="gray", label=label)
    axis.set_yscale("log")
    axis.set_yticks([1.2, 1.5, 2, 3, 4, 6], ["1.2", "1.5", "2", "3", "4", "6"])
    axis.minorticks_off()
    axis.set_xlabel("steps")
    axis.set_ylabel("bits per byte")
    axis.set_title("Training of the shipped model (weights dropped), and held-out text")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
