"""Engines on trained weights, and the model alone to say what their answers must be.

The oracle knows no slots, batches, chunks or caches: it feeds a whole text at once to the model,
in a state of its own, and draws each token anew from what came before it.

Legend: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

import config
from config import ModelTable
from config import load_model as load_model_config
from config.schema import ModelConfig
from engine.core import EngineCore
from engine.engine import build
from engine.kernels.philox import uniform
from engine.model.rwkv7 import RWKV7, Batch
from engine.model.weights import load_model
from engine.penalties import Penalties
from engine.sampler import draw
from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, FinishReason, OutputDelta, SamplingParams
from tests.conftest import SHARED_DIR
from tests.engine.replica import Recorder

CONFIG_DIR = Path(config.__file__).parent
EMBEDDED_VOCAB = CONFIG_DIR / "assets/rwkv_vocab_tiny.txt"
MODELS_DIR = SHARED_DIR / "assets/models"
DEMO_VOCAB = SHARED_DIR / "assets/vocab/rwkv_vocab_small2047.txt"
EXACT = ["embedded-float64", "reverse-float64"]  # every token is certain
MODELS = [*EXACT, "embedded-float32", "chat-demo-float32"]
PARAGRAPH = 16
TEXT = (
    "User: Tell me a story about a little dog.\n\nAssistant: Once upon a time there was a little"
    " dog called Max. Max liked to play in the park with his friends, a cat and a small red bird."
    " One day it rained, and nobody came. Max was sad, so he went to look for them. \n\nUser: Did"
    " he find them?\n\nAssistant: Yes, he found them under a big tree, and they all laughed. Then"
    " the sun came out again, and they ran home together.\n\n"
)
SAMPLED = SamplingParams(
    seed=5, top_p=0.95, presence_penalty=0.4, repetition_penalty=0.1, penalty_decay=0.98,
    max_tokens=20, stop_token_ids=(), has_logprobs=True,
)  # fmt: skip
_ids = count()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    cfg: ModelConfig
    weights_path: Path
    vocab_path: Path


def _checkpoint(name: str, folder: Path) -> Checkpoint:
    """Skips the test where the weights are not there; the embedded ones always are."""
    if name == "embedded":
        return Checkpoint(
            load_model_config(CONFIG_DIR, "rwkv-lm-tiny"),
            CONFIG_DIR / "assets/rwkv-lm-tiny.safetensors",
            EMBEDDED_VOCAB,
        )
    if name == "chat-demo":
        cfg = ModelConfig(name=name, num_cells=4, vocab_size=2048, embedded_dim=128, num_heads=2)
        path = MODELS_DIR / "rwkv7-chat-demo-D128-L4-V2048.pth"
        vocab = DEMO_VOCAB
    else:
        cfg = ModelConfig(name=name, num_cells=4, vocab_size=260, embedded_dim=32, num_heads=2)
        path = MODELS_DIR / "rwkv7-reverse-L4-D32.pth"
        vocab = folder / "bytes.txt"
        vocab.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)))
    if not path.is_file() or not vocab.is_file():
        pytest.skip(f"needs {path.name} and its vocabulary in shared/assets beside the checkout")
    if name == "reverse":
        path = _widened(path, cfg.vocab_size, folder)
    return Checkpoint(cfg, path, vocab)


def _widened(path: Path, vocab_size: int, folder: Path) -> Path:
    """The same weights, with tokens it was not trained on: a vocabulary must have every byte."""
    weights = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("emb.weight", "head.weight"):
        known = weights[name]
        shape = (vocab_size - known.shape[0], known.shape[1])
        more = torch.randn(shape, generator=generator) * known.float().std()
        weights[name] = torch.cat([known, more.to(known.dtype)])
    torch.save(weights, folder / "widened.pth")
    return folder / "widened.pth"


def real_table(model: str, folder: Path, **keys: object) -> ModelTable:
    """A table for a model of MODELS; `folder` takes what files it needs beside."""
    name, _, dtype = model.rpartition("-")
    checkpoint = _checkpoint(name, folder)
    defaults: dict[str, object] = dict(
        model=checkpoint.cfg, model_name=model, model_cfg=name,
        weights_path=checkpoint.weights_path, tokenizer_vocab_path=str(checkpoint.vocab_path),
        device_type="cpu", dtype=dtype, num_threads=1, max_batch_size=4, paragraph_len=PARAGRAPH,
        max_context_len=0, host_state_mib=32,
    )  # fmt: skip
    return ModelTable(**(defaults | keys))  # type: ignore[arg-type]


@asynccontextmanager
async def opened(table: ModelTable, stats: Recorder | None = None) -> AsyncIterator[EngineCore]:
    """A started engine; its books are checked before it is closed."""
    core = build(table, stats)
    core.start()
    try:
        yield core
        core._scheduler.check()
    finally:
        await core.close()


def request(prompt: Sequence[int], params: SamplingParams, **keys: object) -> EngineRequest:
    defaults: dict[str, object] = dict(request_id=f"request-{next(_ids)}", owner="me")
    return EngineRequest(prompt_ids=tuple(prompt), sampling=params, **(defaults | keys))  # type: ignore[arg-type]


async def ask(
    core: EngineCore, prompt: Sequence[int], params: SamplingParams, **keys: object
) -> OutputDelta:
    """The whole answer."""
    return await core.submit(request(prompt, params, **keys)).collect()


def mixed_params(number: int) -> SamplingParams:
    """Greedy, sampled, with and without penalties and limits."""
    return SamplingParams(
        temperature=(0.0, 0.7, 1.0, 1.5)[number % 4],
        top_p=(1.0, 0.8)[number % 2],
        top_k=(0, 0, 20)[number % 3],
        presence_penalty=(0.5, 0.0, 0.3)[number % 3],
        repetition_penalty=(0.0, 0.2)[number % 2],
        penalty_decay=0.97,
        seed=number,
        max_tokens=10 + number % 7,
        stop_token_ids=(),
        has_logprobs=True,
    )


def text_ids(model: str, num_tokens: int, start: int = 0) -> list[int]:
    """Tokens of a text that the model may have been trained on, token 0 first."""
    is_demo = model.startswith("chat-demo")
    ids = tokenizer_of(str(DEMO_VOCAB if is_demo else EMBEDDED_VOCAB)).encode(TEXT)
    if model.startswith("reverse"):
        ids = [1 + i % 11 for i in ids]
    return [0, *islice(cycle(ids), start, start + num_tokens - 1)]


@cache
def tokenizer_of(path: str) -> Tokenizer:
    return Tokenizer.load(path)


@cache
def _model(path: Path, cfg: ModelConfig) -> RWKV7:
    return load_model(path, cfg, torch.device("cpu"), torch.float64)


class Oracle:
    """The model of a table alone, in float64 whatever the engine computes in.

    An engine in float64 must draw every token that is drawn here, with log probabilities to 1e-10.
    One in float32 has them to 1e-5 (below -10, to 1e-6 of themselves: 8 ulp), and may draw a token
    that a draw 3e-5 beside gives: where the border between two tokens lies depends on rounding.
    """

    def __init__(self, table: ModelTable) -> None:
        assert table.weights_path is not None
        self._model = _model(table.weights_path, table.model)
        self._tokenizer = tokenizer_of(table.tokenizer_vocab_path)
        self._banned = self._tokenizer.ids_without_text(table.model.vocab_size)
        self._slack = 0.0 if table.dtype == "float64" else 3e-5
        self.tolerance = 1e-10 if table.dtype == "float64" else 1e-5
        self.worst_error = 0.0  # of all log probabilities so far

    @property
    def wkv_shape(self) -> tuple[int, ...]:
        return self._model.layout.wkv_shape

    def logits(self, ids: Sequence[int], wkv: Tensor | None = None) -> Tensor:
        """Logits [T, V] of a text, from the zero state or from wkv [L, H, N, N]."""
        state, slots = self._model.new_state(1, "cpu"), torch.tensor([0])
        if wkv is not None:
            state.wkv[0] = wkv
        with torch.inference_mode():
            hidden = self._model(torch.tensor(list(ids)), Batch((len(ids),), slots, slots), state)
            logits_TV: Tensor = self._model.head(hidden)
        return logits_TV

    def check(
        self,
        answer: OutputDelta,
        text: Sequence[int],
        params: SamplingParams,
        wkv: Tensor | None = None,
    ) -> None:
        """Raise unless this is the answer after `text`, which includes what a state stood for."""
        assert answer.error is None, answer.error
        tokens = answer.token_ids
        assert answer.num_output_tokens == len(tokens) > 0
        logits_TV = self.logits([*text, *tokens[:-1]], wkv)[len(text) - 1 :]
        penalties = Penalties(params)
        for i, (token, logits_V) in enumerate(zip(tokens, logits_TV, strict=True)):
            if params.has_logprobs:
                error = abs(answer.logprobs[i] - float(logits_V.log_softmax(-1)[token]))
                self.worst_error = max(self.worst_error, error)
                limit = self.tolerance * max(1.0, abs(answer.logprobs[i]) / 10)
                assert error <= limit, f"log probability of token {i} is off by {error}"
            possible = self._draws(logits_V, penalties, params, len(text) + i)
            assert token in possible, f"token {i} is {token}, must be in {possible}"
            penalties.update([token])
        self._check_end(answer, params)

    def _draws(
        self, logits_V: Tensor, penalties: Penalties, params: SamplingParams, position: int
    ) -> Container[int]:
        """What may be drawn; in float64 one token."""
        logits_V = logits_V.clone()
        logits_V[[*self._banned, *params.banned_token_ids]] = -torch.inf
        penalties.apply(logits_V)
        if params.is_greedy:
            return set((logits_V >= logits_V.max() - self._slack).nonzero()[:, 0].tolist())
        at = uniform(params.seed, position)
        goals = [max(at - self._slack, 0.0), min(at + self._slack, 1.0)]
        first, last = draw(logits_V.expand(2, -1), [params] * 2, goals)
        return range(first, last + 1)  # those between have hardly any mass

    def _check_end(self, answer: OutputDelta, params: SamplingParams) -> None:
        """The text is that of the tokens, in front of a stop string or a stop token."""
        tokens = list(answer.token_ids)
        is_stopped = tokens[-1] in params.stop_token_ids
        shown = tokens[:-1] if is_stopped else tokens
        assert not set(shown) & set(params.stop_token_ids), "went on behind a stop token"
        data = b"".join(map(self._tokenizer.token_bytes, shown))
        begins = [data.find(stop.encode()) for stop in params.stop]
        begins = [begin for begin in begins if begin >= 0]
        assert (answer.matched_stop is not None) == bool(begins), f"{answer.matched_stop} {begins}"
        assert answer.text == data[: min(begins, default=len(data))].decode("utf-8", "replace")
        has_ended = is_stopped or bool(begins)
        assert answer.finish_reason == (FinishReason.STOP if has_ended else FinishReason.LENGTH)
        assert has_ended or len(tokens) == params.max_tokens


def save_tuned(path: Path, oracle: Oracle, seed: int) -> Tensor:
    """A random time_state file; what it means as wkv [L, H, N, N], row = key."""
    generator = torch.Generator().manual_seed(seed)
    shape = oracle.wkv_shape
    states = torch.randn(shape, generator=generator) * 0.5
    torch.save({f"blocks.{i}.att.time_state": states[i].clone() for i in range(shape[0])}, path)
    return states.mT
