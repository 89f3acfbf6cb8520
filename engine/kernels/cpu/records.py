"""What the kernels are told, as C structures: addresses and sizes, all int64.

Vectors of channels are float32, padded with zeros to a multiple of 64.
"""

from __future__ import annotations

import numpy as np

FLOAT32, BFLOAT16, INT8 = range(3)  # how matrices are stored
STEP, HEAD, NOTHING = range(3)  # jobs


def _record(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int64) for name in names])


MATRIX = _record("weights", "scales", "num_inputs", "num_outputs", "num_blocks")

# The matrices of a layer, in the order in which they lie in `matrices`; the head is after all.
RECEPTANCE, KEY, VALUE, W1, A1, G1, V1, W2, A2, G2, V2, OUTPUT, FFN_KEY, FFN_VALUE = range(14)
NUM_MATRICES = 14

LAYER = _record(
    *("ln1_weight", "ln1_bias", "ln2_weight", "ln2_bias"),
    *("mus", "ffn_mu"),  # mus [6, channels] in the order r, w, k, v, a, g
    *("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln_x_weight", "ln_x_bias"),
)

MODEL = _record(
    *("kind", "num_layers", "channels", "padded", "num_heads", "head_size", "vocab_size"),
    *("emb", "ln0_weight", "ln0_bias", "ln_out_weight", "ln_out_bias"),
)

# Rows of one width that a matrix is going to multiply: float32, or int8 with its scales.
ROWS = _record("values", "scales", "corrections", "stride")
MIXED_R, MIXED_W, MIXED_K, MIXED_V, MIXED_A, MIXED_G = range(6)
RANK_W, RANK_A, RANK_G, RANK_V, READ, FFN_MIXED, FFN_HIDDEN, LAST = range(6, 14)
NUM_ROWS = 14

RUN = _record(
    *("job", "num_rows", "num_seqs"),
    *("tokens", "starts", "src", "dst"),  # int64: [rows], [seqs + 1], [seqs], [seqs]
    *("wkv", "wkv_slot", "shift", "shift_slot"),  # addresses, and float32 from slot to slot
    *("x", "r", "k", "v", "v_first", "d", "a", "g", "m", "last", "last_ffn"),  # [rows, padded]
    *("hidden", "logits"),  # [rows, channels] and [rows, vocab_size], of the caller
    *("scratch", "scratch_size"),  # float32 of each thread
)
