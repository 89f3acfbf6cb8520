"""Bits per byte, against a plain loop over documents."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.tokenizer import Tokenizer
from tests.train.runs import random_documents, shaken_model, write_dataset
from train import evaluate as evaluation
from train.binidx import DatasetError, open_dataset
from train.vocab import BYTES, write_vocabulary


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_vocabulary(tmp_path / "v.txt", [*BYTES, b"abc"])
    return Tokenizer.load(tmp_path / "v.txt")


def test_bytes_are_those_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["abcabc!", "é"]
    write_dataset(tmp_path / "d", [tokenizer.encode(x) for x in texts])
    assert evaluation.num_bytes_of(open_dataset(tmp_path / "d"), tokenizer) == 7 + 2


def test_data_of_another_vocabulary_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_dataset(tmp_path / "d", [[5, 999]])
    with pytest.raises(DatasetError, match="999"):
        evaluation.num_bytes_of(open_dataset(tmp_path / "d"), tokenizer)


def test_equals_one_document_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(9, seed=3)
    write_dataset(tmp_path / "d", documents)
    model = shaken_model()
    nats = 0.0
    with torch.no_grad():
        for document in documents:
            inputs = torch.tensor([[0, *document]])
            log_probs = model.head(model.hidden(inputs))[0].log_softmax(-1)
            targets = torch.tensor([*document, 0])
            nats -= log_probs[torch.arange(len(targets)), targets].sum().item()
    before = [p.clone() for p in model.parameters()]
    for tokens_per_batch in (1, 100, 4096):
        monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens_per_batch)
        result = evaluation.evaluate(model, open_dataset(tmp_path / "d"), 123)
        assert result.loss == pytest.approx(nats / result.num_tokens, rel=1e-9)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 123, rel=1e-9)
    assert result.num_tokens == sum(len(x) + 1 for x in documents)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
