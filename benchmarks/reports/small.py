"""The shipped model: its loss curve, and its bits per byte beside the baseline's.

small.json is the curve.json that its run left, with the date and the commit beside.
"""

import json
import pathlib

import matplotlib.pyplot as plt

HELD_OUT = pathlib.Path(__file__).parents[1] / "results" / "held_out.json"
ORDER = 6


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
    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.plot(steps, [point["next"] for point in points], label="next byte")
    for i in range(len(points[0]["drafts"])):
        losses = [point["drafts"][i] for point in points]
        axis.plot(steps, losses, alpha=0.6, label=f"draft {i + 1}")
    held_out = result["held_out_bits_per_byte"]
    axis.axhline(
        held_out, color="black", linestyle="--", label=f"held out, {held_out:.3f}"
    )
    axis.axhline(
        baseline,
        color="gray",
        linestyle=":",
        label=f"Kneser-Ney, held out, {baseline:.3f}",
    )
    axis.set_yscale("log")
    axis.set_yticks([1.2, 1.5, 2, 3, 4, 6], ["1.2", "1.5", "2", "3", "4", "6"])
    axis.minorticks_off()
    axis.set_xlabel("steps")
    axis.set_ylabel("bits per byte")
    axis.set_title("Training of the shipped model (weights dropped), and held-out text")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
