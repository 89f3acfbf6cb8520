"""A GGUF file, which llama.cpp loads, from an RWKV-7 checkpoint and its vocabulary.

    python -m benchmarks.gguf WEIGHTS VOCABULARY OUT.gguf [--dtype q8_0]

The container follows the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md, version 3);
names and shapes are those that llama.cpp's architecture `rwkv7` asks for. Everything is written
as float32, or the large matrices as float16 or Q8_0: one float16 scale for 32 int8. It knows no
server.

Legend: C channels, V vocabulary, D a rank.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.model.rwkv7 import ModelDims
from engine.model.weights import dims_of, load_checkpoint
from engine.tokenizer import Tokenizer

VERSION = 3
ALIGNMENT = 32
CONTEXT_LEN = 1 << 20  # an RWKV has none; llama.cpp divides what it is given among its slots
LAYER_NORM_EPS = 1e-5
# The template of RWKV7-G1, as api/chat.py renders it (which also collapses blank lines).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'User' if message.role == 'tool' else message.role | capitalize }}"
    ": {{ message.content | trim }}\n\n{% endfor %}Assistant:"
)
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of values
TENSOR_TYPES = {"float32": 0, "float16": 1, "q8_0": 8}
Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens


@dataclass(frozen=True, slots=True)
class TypedTensor:
    """An array as it lies in the file, row-major; GGUF lists its dimensions the other way round."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray[tuple[int, ...], np.dtype[Any]]


def write_gguf(weights: Path, vocabulary: Path | str, out: Path, dtype: str = "float32") -> None:
    """Raises WeightsError or TokenizerError for a file that is none of ours, ValueError for a
    `dtype` other than float32, float16 and q8_0."""
    if dtype not in TENSOR_TYPES:
        raise ValueError(f"dtype = {dtype!r}: must be 'float32', 'float16' or 'q8_0'")
    tensors = load_checkpoint(weights)
    dims = dims_of(tensors, weights)
    values = [*_model_values(dims), *_tokenizer_values(Tokenizer.load(vocabulary), dims.vocab_size)]
    entries = list(_tensors(tensors, dims, dtype))
    with out.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", VERSION, len(entries), len(values)))
        for value in values:
            file.write(value)
        offset = 0
        for entry in entries:
            shape = entry.shape[::-1]
            file.write(_string(entry.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            file.write(struct.pack("<IQ", TENSOR_TYPES[entry.dtype], offset))
            offset += entry.data.nbytes + _padding(entry.data.nbytes)
        file.write(bytes(_padding(file.tell())))
        for entry in entries:
            file.write(entry.data.tobytes())
            file.write(bytes(_padding(entry.data.nbytes)))


def _model_values(dims: ModelDims) -> Iterator[bytes]:
    yield _value("general.architecture", STRING, _string("rwkv7"))
    yield _value("rwkv7.attention.layer_norm_epsilon", FLOAT32, struct.pack("<f", LAYER_NORM_EPS))
    for key, number in {
        "context_length": CONTEXT_LEN,
        "embedding_length": dims.embedded_dim,
        "feed_forward_length": dims.ffn_dim,
        "block_count": dims.num_cells,
        "attention.head_count": 0,  # none that attends
        "wkv.head_size": dims.head_size,
        "token_shift_count": 2,
        "attention.decay_lora_rank": dims.w_lora_rank,
        "attention.iclr_lora_rank": dims.a_lora_rank,
        "attention.value_residual_mix_lora_rank": dims.v_lora_rank,
        "attention.gate_lora_rank": dims.g_lora_rank,
    }.items():
        yield _value(f"rwkv7.{key}", UINT32, struct.pack("<I", number))


def _tokenizer_values(tokenizer: Tokenizer, vocab_size: int) -> Iterator[bytes]:
    """Every byte of a token as \\xNN: llama.cpp undoes Python's escapes, and needs no other."""
    texts, types = [b"<s>"], [CONTROL]
    for token_id in range(1, vocab_size):
        if tokenizer.has_text(token_id):
            texts.append(b"".join(b"\\x%02x" % byte for byte in tokenizer.token_bytes(token_id)))
            types.append(NORMAL)
        else:
            texts.append(b"[UNUSED%d]" % token_id)
            types.append(UNUSED)
    yield _value("tokenizer.ggml.model", STRING, _string("rwkv"))
    yield _value("tokenizer.ggml.tokens", ARRAY, _array(STRING, map(_string, texts), vocab_size))
    packed = (struct.pack("<i", kind) for kind in types)
    yield _value("tokenizer.ggml.token_type", ARRAY, _array(INT32, packed, vocab_size))
    for name in ("bos_token_id", "eos_token_id"):
        yield _value(f"tokenizer.ggml.{name}", UINT32, struct.pack("<I", 0))
    yield _value("tokenizer.ggml.add_bos_token", BOOL, b"\x00")
    yield _value("tokenizer.chat_template", STRING, _string(CHAT_TEMPLATE))


def _tensors(tensors: Mapping[str, Tensor], dims: ModelDims, dtype: str) -> Iterator[TypedTensor]:
    """All tensors of the file, one at a time. Matrices in `dtype`, the rest in float32."""

    def small(name: str, tensor: Tensor) -> TypedTensor:
        data = tensor.to(torch.float32).contiguous().numpy()
        return TypedTensor(name, data.shape, "float32", data)

    def large(name: str, tensor: Tensor) -> TypedTensor:
        data = small(name, tensor).data
        packed = _q8_0(data) if dtype == "q8_0" else data.astype(dtype)
        return TypedTensor(name, data.shape, dtype, packed)

    yield large("token_embd.weight", tensors["emb.weight"])
    yield large("output.weight", tensors["head.weight"])
    for kind in ("weight", "bias"):
        yield small(f"token_embd_norm.{kind}", tensors[f"blocks.0.ln0.{kind}"])
        yield small(f"output_norm.{kind}", tensors[f"ln_out.{kind}"])
    for layer in range(dims.num_cells):
        block, out = f"blocks.{layer}.", f"blk.{layer}."
        for kind in ("weight", "bias"):
            yield small(f"{out}attn_norm.{kind}", tensors[f"{block}ln1.{kind}"])
            yield small(f"{out}attn_norm_2.{kind}", tensors[f"{block}ln2.{kind}"])
            yield small(f"{out}time_mix_ln.{kind}", tensors[f"{block}att.ln_x.{kind}"])
        for name in ("receptance", "key", "value", "output"):
            yield large(f"{out}time_mix_{name}.weight", tensors[f"{block}att.{name}.weight"])
        for name in ("key", "value"):
            yield large(f"{out}channel_mix_{name}.weight", tensors[f"{block}ffn.{name}.weight"])
        yield small(f"{out}channel_mix_lerp_k.weight", tensors[f"{block}ffn.x_k"].reshape(1, 1, -1))
        mixes = [tensors[f"{block}att.x_{name}"].reshape(1, 1, -1) for name in "rwkvag"]
        yield small(f"{out}time_mix_lerp_fused.weight", torch.stack(mixes))
        for name in ("k_k", "k_a", "r_k"):
            yield small(f"{out}time_mix_{name}.weight", tensors[f"{block}att.{name}"].reshape(-1))
        for name, tensor in _low_rank(tensors, f"{block}att.", layer):
            yield small(f"{out}time_mix_{name}.weight", tensor)


def _q8_0(data: np.ndarray[tuple[int, ...], Any]) -> np.ndarray[tuple[int, ...], Any]:
    """Blocks of 32 in a row: the largest magnitude becomes 127."""
    groups = data.reshape(-1, 32)
    scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    blocks = np.empty(len(groups), Q8_0_BLOCK)
    blocks["scale"] = scales[:, 0]
    blocks["values"] = np.rint(groups * inverse)
    return blocks


def _low_rank(tensors: Mapping[str, Tensor], att: str, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Down [D, C] and up [C, D] projections, output rows first, and their biases [C].

    llama.cpp wants the value residual of the first layer, which no one uses, with the rank of a.
    """
    for name in "wavg":
        source = "a" if name == "v" and layer == 0 else name
        if name != "g":
            yield f"{name}0", tensors[f"{att}{source}0"].reshape(-1)
        yield f"{name}1", tensors[f"{att}{source}1"].T
        yield f"{name}2", tensors[f"{att}{source}2"].T


def _value(key: str, kind: int, data: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + data


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _array(kind: int, items: Iterable[bytes], num_items: int) -> bytes:
    return struct.pack("<IQ", kind, num_items) + b"".join(items)


def _padding(num_bytes: int) -> int:
    return -num_bytes % ALIGNMENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("vocabulary", help="path, or rwkv_vocab_v20230424")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=sorted(TENSOR_TYPES), default="float32")
    args = parser.parse_args()
    write_gguf(args.weights, args.vocabulary, args.out, args.dtype)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
