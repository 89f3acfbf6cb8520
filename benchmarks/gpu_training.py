"""A step of training the 0.1B model: forward, backward, clipping and AdamW, on random tokens.

It fits the same tokens again and again, so the loss has to fall.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_device import Bench, Row
from benchmarks.gpu_model import random_model
from engine.kernels.optimizer import AdamWStep
from engine.model.rwkv7 import RWKV7
from train.utilization import PEAK_BF16_TFLOP_PER_S, training_flop_per_token


class Training:
    """A model whose weights and gradients are views of flat buffers, as the trainer has them."""

    def __init__(self, bench: Bench, model: RWKV7) -> None:
        self._model, self._kernels = model.requires_grad_(True), bench.kernels
        self._device_type, self._num_steps = bench.device.type, 0
        self._flat = torch.zeros(4, model.num_parameters, device=bench.device)
        first = 0
        for parameter in model.parameters():
            places = slice(first, first + parameter.numel())
            weights, grads = (x[places].view(parameter.shape) for x in self._flat[:2])
            weights.copy_(parameter.data)
            parameter.data, parameter.grad = weights, grads
            first = places.stop

    def step(self, tokens_BT: Tensor) -> float:
        """The loss before the step, in nats."""
        weights, grads, exp_avg, exp_avg_sq = self._flat.unbind()
        grads.zero_()
        with torch.autocast(self._device_type, torch.bfloat16):
            hidden_BTC = self._model.hidden(tokens_BT[:, :-1])
        loss = self._kernels.cross_entropy_l2wrap(
            hidden_BTC.flatten(0, 1).bfloat16(),
            self._model.head.weight,
            tokens_BT[:, 1:].flatten(),
        )
        loss.backward()
        factor, _ = self._kernels.clip_factor(grads, loss.detach(), 1.0)
        self._num_steps += 1
        adam = AdamWStep(
            learning_rate=6e-4, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-18,
            number=self._num_steps,
        )  # fmt: skip
        self._kernels.adamw(weights, grads, exp_avg, exp_avg_sq, factor, adam)
        return float(loss.detach())


def training_rows(bench: Bench) -> Iterator[Row]:
    name, batch_size, length = ("tiny", 1, 16) if bench.is_tiny else ("0.1b", 8, 4096)
    model = random_model(bench, name, torch.float32)
    training = Training(bench, model)
    tokens = bench.tokens(model.dims.vocab_size, batch_size, length + 1)
    first_loss = training.step(tokens)
    seconds = bench.seconds(lambda: training.step(tokens), 5)
    last_loss = training.step(tokens)
    rate = batch_size * length / seconds
    flop_per_s, peak = rate * training_flop_per_token(model), PEAK_BF16_TFLOP_PER_S.get(bench.name)
    yield {
        "name": "training step",
        "model": name,
        "batch": batch_size,
        "length": length,
        "tokens_per_s": rate,
        "share_of_matmul": flop_per_s / bench.flop_per_s if bench.flop_per_s else None,
        "mfu": flop_per_s / peak / 1e12 if peak else None,
        "loss": [first_loss, last_loss],
        "is_right": last_loss < first_loss,
    }
