"""A decode step of the whole layer."""

import pathlib

import matplotlib.pyplot as plt

from reports.style import legend, line, markdown, source

LABELS = {
    "triton": "fused update",
    "unfused": "unfused pair",
    "xla": "XLA throughout",
}


def models_of(result: dict) -> dict[str, dict[str, dict[int, dict]]]:
    """Rows by model, contender and batch."""
    models: dict[str, dict[str, dict[int, dict]]] = {}
    for row in result["rows"]:
        if "median_us" in row:
            contenders = models.setdefault(row["model"], {})
            contenders.setdefault(row["contender"], {})[row["N"]] = row
    return models


def tables(result: dict) -> str:
    lines = []
    for model, contenders in models_of(result).items():
        batches = sorted({n for rows in contenders.values() for n in rows})
        shown = [(LABELS[name], _cells(r, batches)) for name, r in contenders.items()]
        lines += [
            *markdown(f"{model}, us (kernels), N =", map(str, batches), shown),
            "",
        ]
    return "\n".join([*lines, source(result)])


def _cells(rows: dict[int, dict], batches: list[int]) -> list[str]:
    return [
        f"{rows[n]['median_us']:.1f} ({rows[n]['kernels']})" if n in rows else "-"
        for n in batches
    ]


def plot(result: dict, path: pathlib.Path) -> None:
    models = models_of(result)
    figure, axes = plt.subplots(1, len(models), figsize=(9, 4.5), squeeze=False)
    for axis, (model, contenders) in zip(axes[0], models.items(), strict=True):
        for name, rows in contenders.items():
            batches = sorted(rows)
            times = [rows[n]["median_us"] for n in batches]
            axis.plot(batches, times, **line(name) | dict(label=LABELS[name]))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, [str(n) for n in batches])
        axis.set_title(model)
        axis.set_xlabel("sequences, one token each")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("microseconds on the device")
    figure.suptitle(f"A decode step of the layer, {result['device']}")
    legend(figure, axes[0, 0])
    figure.savefig(path, dpi=130)


def layer(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot(result, folder / "layer.png")
    return {"layer": tables(result)}
