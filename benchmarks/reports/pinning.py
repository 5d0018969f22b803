"""What one launch for all batches costs beside each batch's own."""

import pathlib

from reports.style import markdown, source


def pinning(result: dict, folder: pathlib.Path) -> dict[str, str]:
    """Of each dtype the launch whose worst batch is the least, which comes first."""
    del folder  # a table alone
    best: dict[str, dict] = {}
    for row in result["costs"]:
        best.setdefault(row["state_dtype"], row)
    batches = list(
        dict.fromkeys(key for row in best.values() for key in row["by_batch"])
    )
    shown = [
        (
            f"{dtype} state, {row['launch'].removeprefix('pinned: ')}",
            [
                f"{row['by_batch'][key]:.2f}" if key in row["by_batch"] else "-"
                for key in batches
            ],
        )
        for dtype, row in best.items()
    ]
    lines = markdown("time of one launch / each batch's own", batches, shown)
    return {"pinning": "\n".join([*lines, "", source(result)])}
