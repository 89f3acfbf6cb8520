"""llama.cpp's model loop, without its server: the C functions in the wheel `xllamacpp`.

Their structures differ from version to version. What is passed by value is made larger than any of
them, comes filled from llama.cpp itself, and only fields are set that are found by their defaults.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUM_WORDS = 128  # of a structure, at most
DEFAULT_SIZES = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max: the first fields
DEFAULT_THREADS = (4, 4)  # n_threads, n_threads_batch, one after the other
MAX_TOKENS = 512


class _Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * NUM_WORDS)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class LlamaModel:
    """Sequences 0 to `num_seqs` - 1, each with a state of its own."""

    def __init__(self, gguf: Path, num_seqs: int, num_threads: int) -> None:
        import xllamacpp

        folder = Path(xllamacpp.__file__).parent
        self._lib: Any = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
        self._declare()
        model = self._lib.llama_model_load_from_file(
            str(gguf).encode(), self._lib.llama_model_default_params()
        )
        assert model, f"llama.cpp did not load {gguf}"
        parameters = self._lib.llama_context_default_params()
        words = list(parameters.words)
        assert tuple(words[:4]) == DEFAULT_SIZES, f"unknown context parameters: {words[:16]}"
        threads = next(i for i in range(4, 16) if tuple(words[i : i + 2]) == DEFAULT_THREADS)
        sizes = (num_seqs * MAX_TOKENS * 2, MAX_TOKENS, MAX_TOKENS, num_seqs)
        parameters.words[:4] = sizes
        parameters.words[threads : threads + 2] = (num_threads, num_threads)
        self._context = self._lib.llama_init_from_model(model, parameters)
        assert self._context, "llama.cpp made no context"
        self._vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model))
        self._batch = self._lib.llama_batch_init(MAX_TOKENS, 0, num_seqs)
        self._lengths = [0] * num_seqs

    def forget(self) -> None:
        """All sequences begin anew."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._lengths = [0] * len(self._lengths)

    def feed(self, parts: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
        """Tokens of sequence 0, 1, ...; the logits after the last of each, valid until the next."""
        batch, at, lasts = self._batch, 0, []
        for seq, tokens in enumerate(parts):
            for token in tokens:
                batch.token[at], batch.pos[at] = token, self._lengths[seq]
                batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, seq, 0
                self._lengths[seq] += 1
                at += 1
            batch.logits[at - 1] = 1
            lasts.append(at - 1)
        batch.n_tokens = at
        code = self._lib.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode returned {code}"
        return [
            np.ctypeslib.as_array(
                self._lib.llama_get_logits_ith(self._context, i), (self._vocab_size,)
            )
            for i in lasts
        ]

    def _declare(self) -> None:
        pointer, lib = ctypes.c_void_p, self._lib
        floats = ctypes.POINTER(ctypes.c_float)
        for name, result, arguments in (
            ("llama_model_default_params", _Parameters, []),
            ("llama_context_default_params", _Parameters, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
            ("llama_init_from_model", pointer, [pointer, _Parameters]),
            ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
            ("llama_batch_init", _Batch, [ctypes.c_int32] * 3),
            ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
            ("llama_get_logits_ith", floats, [pointer, ctypes.c_int32]),
            ("llama_get_memory", pointer, [pointer]),
            ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
