"""A decode step of the whole layer."""

import pathlib

import matplotlib.pyplot as plt

from reports.style import STYLE, WIDTH, legend, markdown, source

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
    """Bars, since of lines the unfused pair's would lie on the fused update's."""
    models = models_of(result)
    size = WIDTH, 1.2 + 2.2 * len(models)
    figure, axes = plt.subplots(len(models), figsize=size, squeeze=False)
    for axis, (model, contenders) in zip(axes[:, 0], models.items(), strict=True):
        batches = sorted({n for rows in contenders.values() for n in rows})
        fused, width = contenders["triton"], 0.8 / len(contenders)
        for i, (name, rows) in enumerate(contenders.items()):
            shown = [n for n in batches if n in rows and n in fused]
            at = [batches.index(n) + width * (i + 0.5) - 0.4 for n in shown]
            times = [rows[n]["median_us"] / fused[n]["median_us"] for n in shown]
            look = dict(color=STYLE[name][1], label=LABELS[name], zorder=2)
            bars = axis.bar(at, times, width, **look)
            texts = [f"{rows[n]['median_us']:.0f}" for n in shown]
            axis.bar_label(bars, texts, fontsize=9, padding=1)
        axis.set_xticks(range(len(batches)), [str(n) for n in batches])
        axis.margins(y=0.15)
        axis.set_title(model)
        axis.set_ylabel("time / fused")
        axis.grid(alpha=0.3, axis="y", zorder=0)
    axes[-1, 0].set_xlabel("sequences, one token each")
    figure.suptitle(
        f"A decode step of the layer, {result['device']}\n"
        f"(in units of the fused update's; on the bars: microseconds)"
    )
    legend(figure, axes[0, 0])
    figure.savefig(path)


def layer(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot(result, folder / "layer.png")
    return {"layer": tables(result)}
