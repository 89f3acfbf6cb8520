"""Time to first token of one chat, turn by turn, through HTTP, and a plot of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.served import Server
from benchmarks.words import Words

ANSWER_LEN = 32


def measure(
    servers: Sequence[Server], words: Words, num_turns: int, question_len: int
) -> dict[str, list[dict[str, float]]]:
    """By server the turns in order. Servers take turns, and each is told what itself has said."""
    histories = {server.name: words.document("chat", 16) for server in servers}
    figures: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    print(f"\n{'ms to the first token':24}" + "".join(f"{server.name:>20}" for server in servers))
    for turn in range(num_turns):
        for server in servers:
            history = histories[server.name]
            history += words.ids(f"question {turn}", question_len)
            reply = server.complete(history, ANSWER_LEN)
            history += words.tokenizer.encode(reply.text)
            figures[server.name].append(
                {
                    "num_prompt_tokens": reply.num_prompt_tokens,
                    "num_cached_tokens": reply.num_cached_tokens,
                    "first_token_s": round(reply.first_token_s, 5),
                }
            )
        rows = [turns[-1] for turns in figures.values()]
        label = f"turn {turn + 1}, {rows[0]['num_prompt_tokens']} tokens"
        print(f"{label:24}" + "".join(f"{row['first_token_s'] * 1e3:>20.1f}" for row in rows))
    return figures


def plot(figures: Mapping[str, Sequence[Mapping[str, float]]], title: str, path: Path) -> None:
    """Needs matplotlib; raises SystemExit with the command that installs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("no plot: run `pip install matplotlib`") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, turns in figures.items():
        lengths = [turn["num_prompt_tokens"] for turn in turns]
        axes.plot(lengths, [turn["first_token_s"] * 1e3 for turn in turns], marker="o", label=name)
    axes.set_xlabel("prompt of the turn, tokens")
    axes.set_ylabel("time to first token, ms")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
