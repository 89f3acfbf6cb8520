"""Training, prefill and decoding agree on the same weights; run by test_triton.py interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from config import ModelConfig
from engine.kernels.backend import Batch
from engine.kernels.gpu import backend as gpu
from engine.model.rwkv7 import RWKV7, State
from engine.model.weights import dummy_model
from tests.engine.kernels.wkv_cases import relative_error

NUM_TOKENS = 22
# Two layers, each with a chain of products and norms in float32.
TOLERANCE, GRADIENT_TOLERANCE = 5e-6, 5e-5


def models_of(num_heads: int) -> tuple[RWKV7, RWKV7]:
    """The same weights in float64 with the reference, and in float32 with the kernels."""
    shape = dict(num_cells=2, vocab_size=50, embedded_dim=64, num_heads=num_heads)
    cfg = ModelConfig(name="test", **shape)
    exact, model = (dummy_model(cfg, "cpu", t) for t in (torch.float64, torch.float32))
    exact.load_state_dict(model.state_dict())
    model.kernels = gpu
    return exact.requires_grad_(True), model.requires_grad_(True)


def tokens() -> Tensor:
    return torch.randint(0, 50, (NUM_TOKENS,), generator=torch.manual_seed(3))


@torch.no_grad()
def in_pieces(model: RWKV7, pieces: list[int], state: State) -> Tensor:
    """Hidden rows of a text that goes from the zero page, slot 0, to slot 1."""
    zero, slot = torch.tensor([0]), torch.tensor([1])
    rows = [
        model(piece, Batch((len(piece),), slot if i else zero, slot), state)
        for i, piece in enumerate(tokens().split(pieces))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("num_heads", [4, 1])  # of 16 and of 64 channels
def test_training_prefill_and_decoding_agree(num_heads: int) -> None:
    exact, model = models_of(num_heads)
    wanted_state = exact.new_state(2, "cpu")
    wanted = in_pieces(exact, [NUM_TOKENS], wanted_state)
    hidden = model.hidden(tokens()[None])[0].detach()
    assert relative_error(hidden, wanted) < TOLERANCE
    for pieces in ([NUM_TOKENS], [16, 6], [3, 18, 1], [1] * NUM_TOKENS):
        state = model.new_state(2, "cpu")
        assert relative_error(in_pieces(model, pieces, state), wanted) < TOLERANCE, pieces
        assert relative_error(state.wkv[1], wanted_state.wkv[1]) < TOLERANCE, pieces
        assert relative_error(state.shift[1], wanted_state.shift[1]) < TOLERANCE, pieces


def test_states_stored_in_float16_change_little() -> None:
    """A state loses half of float16's 2^-10 each time that it is stored, 22 times at most."""
    exact, model = models_of(4)
    wanted = in_pieces(exact, [NUM_TOKENS], exact.new_state(2, "cpu"))
    for pieces in ([16, 6], [3, 18, 1], [1] * NUM_TOKENS):
        state = model.new_state(2, "cpu")
        state = State(wkv=state.wkv.half(), shift=state.shift)
        error = relative_error(in_pieces(model, pieces, state), wanted)
        assert error < len(pieces) * 2.0**-11, pieces


def test_gradients_of_all_parameters_agree() -> None:
    exact, model = models_of(4)
    for each in (exact, model):
        each.hidden(tokens()[None, :18]).square().mul(0.5).sum().backward()
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() == got.keys()
    scale = max(float(x.norm()) for x in wanted.values())
    for name, x in wanted.items():
        # Relative to its own norm, or to the largest where it is next to nothing.
        limit = GRADIENT_TOLERANCE * max(float(x.norm()), 1e-3 * scale)
        assert float((got[name].double() - x).norm()) < limit, name
