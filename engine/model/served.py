"""What the engine asks of a model that it serves: `RWKV7`, or the fused one of the CPU."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.kernels.backend import Batch
from engine.model.rwkv7 import ModelDims, State
from engine.state.layout import PageLayout


class ServedModel(Protocol):
    @property
    def dims(self) -> ModelDims: ...

    @property
    def layout(self) -> PageLayout:
        """Of its states, as it likes them best."""
        ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def mixes_lengths(self) -> bool:
        """Whether prompts and single tokens in one call are as quick as in two."""
        ...

    def __call__(self, tokens_T: Tensor, batch: Batch, state: State) -> Tensor:
        """Hidden rows [T, C]; `state` is read at src and written at dst in place."""
        ...

    def head(self, hidden_RC: Tensor) -> Tensor:
        """Logits [R, V]."""
        ...
