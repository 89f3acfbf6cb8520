"""Rates and inter-token times by the number of streams, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot(rows: Sequence[Mapping[str, object]], title: str, path: Path) -> None:
    """Needs matplotlib; raises SystemExit with the command that installs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("no plot: run `pip install matplotlib`") from None
    figure = Figure(figsize=(9, 4), layout="constrained")
    rates, times = figure.subplots(1, 2)
    for name in dict.fromkeys(row["server"] for row in rows):
        of_name = [row for row in rows if row["server"] == name]
        streams = [row["streams"] for row in of_name]
        (line,) = rates.plot(streams, [row["tokens_per_s"] for row in of_name], "o-", label=name)
        spreads = [row.get("inter_token_ms") for row in of_name]
        if any(spreads):
            for key, style in (("p50", "o-"), ("p99", "o:")):
                values = [spread[key] for spread in spreads]
                times.plot(streams, values, style, color=line.get_color(), label=f"{name}, {key}")
    rates.set_ylabel("tokens per second, all streams")
    times.set_ylabel("between two tokens, ms")
    times.set_yscale("log")
    for axes in (rates, times):
        axes.set_xlabel("streams at once")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    rates.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})
