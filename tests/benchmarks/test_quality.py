"""int8 and float16 states cost the embedded model next to nothing, by the benchmark's measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import CONFIG_DIR, FORMATS, held_out, measure


def test_int8_and_half_states_keep_bits_per_byte_and_nearly_every_most_probable_token(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bfloat16", "int8 + bfloat16"):  # slow on a CPU
        monkeypatch.delitem(FORMATS, name)
    texts = held_out(shared_dir / "assets" / "text", 3)
    assets = CONFIG_DIR / "assets"
    weights, vocab = assets / "rwkv-lm-tiny.safetensors", str(assets / "rwkv_vocab_tiny.txt")
    rows = measure(weights, "rwkv-lm-tiny", vocab, texts, answer_len=8)
    exact, half = rows["float32"], rows["float16 states"]
    assert exact["logit_error"] == exact["kl_nats"] == 0
    assert exact["same_top"] == exact["same_answers"] == 1
    assert 0.4 < exact["bits_per_byte"] < 1.0
    for int8 in (rows["int8"], rows["fused int8"]):
        assert abs(int8["bits_per_byte"] / exact["bits_per_byte"] - 1) < 0.01
        assert 0 < int8["kl_nats"] < 1e-3
        assert int8["same_top"] > 0.98
        assert int8["weight_mib"] < 0.5 * exact["weight_mib"]
    assert rows["fused bfloat16"]["kl_nats"] < 1e-4
    assert rows["fused bfloat16"]["same_top"] > 0.98
    assert abs(half["bits_per_byte"] / exact["bits_per_byte"] - 1) < 0.01
    assert 0 < half["kl_nats"] < 1e-3
    assert half["same_top"] > 0.98
    assert half["weight_mib"] == exact["weight_mib"]
