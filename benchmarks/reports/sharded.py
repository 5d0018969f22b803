"""Models that GPUs share out: what was measured, and what follows for a larger one."""

import dataclasses
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from geometries import CONTEXT, LARGE, MODELS

from gdn_jax.models import Config, Model, parameters
from gdn_jax.nn.projections import Heads
from gdn_jax.nn.shares import Shares
from gdn_jax.nn.split import Split
from gdn_jax.sharding import make_mesh
from reports.style import markdown, source

PARTS = 8  # GPUs of a host, which share a group's heads
GPUS = (8, 16, 32, 64)
ROWS = (1, 8, 32, 64, 128, 256)  # sequences of a group
TOKENS = 8192  # of a sequence, read at every step
ROOM = 0.9 * 141e9  # bytes of a GPU, for weights and states
ITEM = 2  # bytes of a weight, of a key, and of what is sent


def done(result: dict, **wanted: Any) -> list[dict]:
    return [
        row
        for row in result["rows"]
        if "absent" not in row and all(row.get(k) == v for k, v in wanted.items())
    ]


def baseline(result: dict, row: dict, rows: int) -> float | None:
    """Tokens a second of one GPU with so many sequences, by XLA's defaults."""
    same = {k: row[k] for k in ("case", "model")}
    found = done(result, gpus=1, rows=rows, options="default", **same)
    return found[0]["tokens_per_s"] if found else None


def measured(result: dict) -> list[str]:
    shown = []
    for row in done(result, case="tensor") + done(result, case="data"):
        gpus, rows = row["gpus"], row["rows"]
        one = baseline(result, row, rows)
        part = baseline(result, row, rows // gpus) if row["case"] == "data" else None
        sent = ", ".join(f"{n} {name}" for name, n in row["collectives"].items())
        head = f"{row['model']}, {'heads' if row['case'] == 'tensor' else 'sequences'}"
        cells = [
            str(rows),
            str(gpus),
            row["options"],
            f"{row['ms_a_step']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            "-" if one is None else f"{row['tokens_per_s'] / one:.2f}",
            "-" if part is None else f"{row['tokens_per_s'] / part / gpus:.2f}",
            sent or "-",
        ]
        shown.append((head, cells))
    columns = ("N", "GPUs", "XLA", "ms a step", "tokens/s", "x one GPU")
    columns += ("x one with its part", "in the program")
    return markdown("model, what is shared out", columns, shown)


def all_reduces(result: dict) -> list[str]:
    by_options: dict[str, dict[int, float]] = {}
    for row in done(result, case="all_reduce"):
        by_options.setdefault(row["options"], {})[row["bytes"]] = row["us_each"]
    sizes = sorted({size for each in by_options.values() for size in each})
    shown = [
        (name, [f"{each[size]:.1f}" if size in each else "-" for size in sizes])
        for name, each in by_options.items()
    ]
    return markdown(
        "us of an all-reduce of so many KB",
        [f"{size / 1024:,.0f}" for size in sizes],
        shown,
    )


def flags_of(result: dict) -> list[str]:
    """What XLA's options are called here."""
    flags = {row["options"]: row.get("flags") for row in result["rows"]}
    named = [f"{name}: `{each}`" for name, each in flags.items() if each]
    return [f"XLA with {'; '.join(named)}.", ""] if named else []


def weights(config: Config, parts: int) -> dict[str, float]:
    """Bytes on a GPU: of experts, of a table of which a few rows are read, of others;
    and all of the model's numbers."""
    heads = Heads(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    split = Split(("model",), parts, vocab=True) if parts > 1 else None
    # no array is put anywhere: any mesh will do
    shares = Shares(make_mesh(), split, heads, config.num_key_value_heads)
    total = dict(experts=0.0, table=0.0, others=0.0, numbers=0.0)
    model = Model(config, jnp.bfloat16, jnp.bfloat16)
    for path, target in parameters.find_targets(model).items():
        kind = "experts" if "/experts_" in path else "others"
        if path.startswith("embed/") and not config.tie_word_embeddings:
            kind = "table"
        size = math.prod(shares.shape(path, target.names, target.shape))
        whole = shares.axis(path, target.names) is None
        total[kind] += target.dtype.itemsize * size / (1 if whole else parts)
        total["numbers"] += math.prod(target.shape)
    return total


def of_sequence(config: Config, parts: int, tokens: int) -> dict[str, float]:
    """Bytes that a sequence takes on a GPU."""
    kinds = config.layer_types
    kv_heads = max(config.num_key_value_heads // parts, 1)
    kv = 2 * kv_heads * config.head_dim * ITEM * tokens
    state = config.linear_num_value_heads // parts * 4
    state *= config.linear_key_head_dim * config.linear_value_head_dim
    return {
        "keys and values": kinds.count("full_attention") * kv,
        "states": kinds.count("linear_attention") * state,
    }


def moved(config: Config, parts: int, rows: int, tokens: int) -> dict[str, float]:
    """Bytes that a step reads and writes on a GPU, at the least."""
    own, each = weights(config, parts), of_sequence(config, parts, tokens)
    used = 0.0
    if config.num_experts:
        used = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** rows
    return {
        "experts": own["experts"] * used,
        "other weights": own["others"],
        "keys and values": rows * each["keys and values"],
        "states": 2 * rows * each["states"],
    }


def slack(result: dict) -> float:
    """By how much the measured model's step takes longer than its bytes do."""
    row = done(result, case="tensor", gpus=1, options="default")[0]
    config = dataclasses.replace(MODELS[row["model"]], num_mtp_layers=0)
    total = sum(moved(config, 1, row["rows"], CONTEXT).values())
    return row["ms_a_step"] / (total / result["copy_tb_per_s"] / 1e9)


def best_options(result: dict) -> tuple[str, int]:
    """XLA's options, and between how many GPUs, with which all-reduces alone were
    fastest: in a graph of nothing else they wait for its launch, and in a step's not.
    """
    total: dict[tuple[str, int], float] = {}
    for row in done(result, case="all_reduce"):
        kind = row["options"], row["gpus"]
        total[kind] = total.get(kind, 0.0) + row["us_each"]
    return min(total, key=lambda kind: total[kind])


def sum_us(result: dict, size: float, parts: int) -> float:
    """Of an all-reduce between so many GPUs of a host, from one between fewer: each
    sends and gets 2 (n - 1) / n of its bytes."""
    options, gpus = best_options(result)
    points = sorted(
        (row["bytes"], row["us_each"])
        for row in done(result, case="all_reduce", options=options, gpus=gpus)
    )
    size *= (parts - 1) / parts / ((gpus - 1) / gpus)
    sizes, us = np.transpose(points)
    if size > sizes[-1]:
        return float(us[-1] * size / sizes[-1])
    return float(np.interp(size, sizes, us))


def layout(result: dict, name: str) -> list[str]:
    config, factor = LARGE[name], slack(result)
    own, each = weights(config, PARTS), of_sequence(config, PARTS, TOKENS)
    held = own["experts"] + own["table"] + own["others"]
    most = int((ROOM - held) / sum(each.values()))
    shown = []
    for rows in ROWS:
        parts = moved(config, PARTS, rows, TOKENS)
        ms = {
            what: factor * size / result["copy_tb_per_s"] / 1e9
            for what, size in parts.items()
        }
        us = sum_us(result, rows * config.hidden_size * ITEM, PARTS)
        ms["sums"] = (2 * config.num_hidden_layers + 1) * us / 1e3
        # Each device gets the others' part once, where a sum is sent and got.
        half = rows * config.vocab_size * ITEM / 2
        ms["logits"] = sum_us(result, half, PARTS) / 1e3
        total = sum(ms.values())
        rate = 1e3 * rows / total
        first = max(ms, key=lambda what: ms[what])
        cells = [
            f"{sum(parts.values()) / 1e9:.1f}",
            f"{PARTS * sum(parts.values()) / rows / 1e9:.2f}",
            f"{total:.1f}",
            f"{first}, {ms[first] / total:.0%}",
            f"{ms['sums'] / total:.0%}",
            *(f"{gpus // PARTS * rate:,.0f}" for gpus in GPUS),
        ]
        shown.append((str(rows) if rows <= most else f"{rows} (no room)", cells))
    columns = ("GB a step and GPU", "GB a token", "ms", "most of it", "sums")
    columns += tuple(f"tokens/s, {gpus} GPUs" for gpus in GPUS)
    options, gpus = best_options(result)
    about = (
        f"{name} has {own['numbers'] / 1e9:.0f}e9 parameters. A GPU of {PARTS} holds "
        f"{held / 1e9:.0f} GB of them, of which {own['experts'] / 1e9:.0f} GB are "
        f"experts, and for each sequence {each['states'] / 1e6:.0f} MB of states and, "
        f"of {TOKENS:,} tokens, {each['keys and values'] / 1e6:.0f} MB of keys and "
        f"values: room for {most} sequences a group. Computed of {factor:.2f} times "
        f"the time of moving the bytes at {result['copy_tb_per_s']:.2f} TB/s, as was "
        f"measured of one GPU, and of all-reduces measured between {gpus} GPUs "
        f'("{options}"), the all-gather of logits as one of half its bytes; tokens '
        "evenly among experts."
    )
    return [about, "", *markdown("sequences a group", columns, shown)]


def sharded(result: dict, folder: pathlib.Path) -> dict[str, str]:
    del folder  # tables alone
    lines = [*measured(result), "", *all_reduces(result), "", *flags_of(result)]
    lines += [f"Inputs: {result['inputs']}. Times: {result['time']}.", source(result)]
    texts = {"sharded": "\n".join(lines)}
    can_tell = done(result, case="tensor", gpus=1) and done(result, case="all_reduce")
    if can_tell:
        [name] = LARGE
        texts["layout"] = "\n".join(layout(result, name))
    return texts
