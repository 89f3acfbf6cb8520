"""The fused model compiled for processors that this one is not: the same bits from all of them."""

from __future__ import annotations

import hashlib

import pytest

pytest.importorskip("numba", reason="the fused kernels are numba's")

from engine.kernels.cpu import features
from tests.engine.kernels.fused_cases import (
    DST,
    DTYPES,
    LENGTHS,
    SHAPES,
    SRC,
    batch,
    fused,
    random_state,
    tokens,
)
from tests.engine.kernels.processors import PATHS, digest_on


def digest() -> str:
    """The path taken, and a hash of all logits and states: prompts and single tokens, then more."""
    lines = [features.int8_dot()]
    for shape in ("64", "16"):
        for dtype in DTYPES:
            model = fused(SHAPES[shape], dtype)
            state, seen = random_state(model), hashlib.sha256()
            for lengths, src in ((LENGTHS, SRC), ((1,) * len(DST), DST)):
                hidden = model(tokens(sum(lengths)), batch(lengths, src, DST), state)
                for part in (model.head(hidden), state.wkv, state.shift):
                    seen.update(part.numpy().tobytes())
            lines.append(f"{shape} {dtype} {seen.hexdigest()}")
    return "\n".join(lines)


@pytest.mark.kernels  # it compiles for another processor
@pytest.mark.parametrize("path", PATHS)
def test_every_path_computes_the_same_model_to_the_bit(path: str) -> None:
    found = digest_on(path, __name__)
    assert found[0] == path
    assert found[1:] == digest().splitlines()[1:]
