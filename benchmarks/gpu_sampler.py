"""Drawing tokens: the sampler that serves here, beside softmax, sort and multinomial in torch.

On a GPU that is the one whose seats live on the device, elsewhere the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_device import Bench, Row
from engine.sampler import Sampler, choose_device_sampler
from engine.types import SamplingParams

TOP_P = 0.9


def sampler_rows(bench: Bench) -> Iterator[Row]:
    vocab_size = 2048 if bench.is_tiny else 65536
    for num_rows in (1, 4) if bench.is_tiny else (1, 32, 256):
        logits = 3 * torch.randn(num_rows, vocab_size, device=bench.device)
        params = [SamplingParams(top_p=TOP_P, seed=seat) for seat in range(num_rows)]
        draw = drawing(bench, logits, params)
        row: Row = {"name": "draw", "rows": num_rows, "vocabulary": vocab_size}
        row["us"] = bench.seconds(draw) * 1e6
        row["us_of_a_graph"] = bench.replayed_seconds([draw]) * 1e6 if not bench.is_tiny else None
        row["torch_us"] = bench.seconds(partial(sorted_draw, logits)) * 1e6
        yield row


def drawing(
    bench: Bench, logits: Tensor, params: list[SamplingParams]
) -> Callable[[], list[int] | Tensor]:
    """What draws a token for each row; not waited for where the device draws."""
    num_rows, vocab_size = logits.shape
    seats = list(range(num_rows))
    on_device = choose_device_sampler(num_rows, vocab_size, bench.device, ())
    if on_device is None:
        host = host_sampler(params)
        return lambda: list(host.sample(logits.clone(), seats, seats).tokens)
    for seat, asked in enumerate(params):
        on_device.start(seat, asked)
    places = torch.tensor(seats, device=bench.device)
    return lambda: on_device.draw(logits, places, places)[0]


def host_sampler(params: list[SamplingParams]) -> Sampler:
    sampler = Sampler(len(params), (), torch.device("cpu"))
    for seat, asked in enumerate(params):
        sampler.start(seat, asked)
    return sampler


def sorted_draw(logits_BV: Tensor) -> Tensor:
    """What many servers do: sort all probabilities, cut at top-p, draw."""
    sorted_BV, order_BV = logits_BV.softmax(-1).sort(-1, descending=True)
    is_out_BV = sorted_BV.cumsum(-1) - sorted_BV > TOP_P
    places_B1 = torch.multinomial(sorted_BV.masked_fill(is_out_BV, 0.0), 1)
    return order_BV.gather(-1, places_B1).squeeze(-1)


def agreement(bench: Bench) -> float:
    """The share of rows whose draw is that of the host's sampler in float64, with the same seeds:
    greedy, free, and cut by top-p, top-k and min-p. Sums rounded otherwise move a few."""
    num_rows, vocab_size = (8, 300) if bench.is_tiny else (256, 65536)
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.2),
        SamplingParams(top_p=TOP_P, top_k=50),
        SamplingParams(top_p=0.7, min_p=0.01),
    )
    params = [
        SamplingParams(temperature=k.temperature, top_p=k.top_p, top_k=k.top_k, min_p=k.min_p,
                       seed=seat)
        for seat, k in ((seat, kinds[seat % len(kinds)]) for seat in range(num_rows))
    ]  # fmt: skip
    logits = 3 * torch.randn(num_rows, vocab_size, device=bench.device)
    got: list[int] = torch.as_tensor(drawing(bench, logits, params)()).tolist()
    seats = list(range(num_rows))
    wanted = host_sampler(params).sample(logits.cpu().double(), seats, seats).tokens
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / num_rows
