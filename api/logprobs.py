"""Log probabilities as OpenAI's two protocols write them. Knows tokens and deltas, no sockets.

They are the model's own, before biases, penalties, temperature and limits, so that they add up to
the likelihood of a text. rwkv-rs reports those after penalties and temperature.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence

from api.errors import invalid
from engine.tokenizer import Tokenizer
from engine.types import OutputDelta, TopLogprobs

Lists = dict[str, list[object]]
LIST_NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
MAX_NUM_CANDIDATES = 64


class ShownTokens:
    """Which tokens of an answer are told about, as its deltas come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_bytes = 0

    def bytes_of(self, token_id: int) -> bytes:
        """b"" also for what the vocabulary does not have, which a prompt may."""
        return self._tokenizer.token_bytes(token_id) if self._tokenizer.has_text(token_id) else b""

    def is_known(self, token_id: int) -> bool:
        return token_id == 0 or self._tokenizer.has_text(token_id)

    def count(self, delta: OutputDelta, *, cuts: bool) -> int:
        """How many of its tokens are shown. With `cuts`, not those behind the end of the text."""
        num_tokens = 0
        for token_id in delta.token_ids:
            is_behind = self._num_bytes >= delta.num_text_bytes
            if cuts and delta.finish_reason is not None and is_behind:
                break
            self._num_bytes += len(self.bytes_of(token_id))
            num_tokens += 1
        return num_tokens


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, piece by piece.

    A token that is not UTF-8 by itself is written `bytes:\\xe4\\xbd`, as OpenAI does, so that
    different tokens never have the same name. A stop token is told about, tokens that were only
    drawn for a stop string are not.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._shown = ShownTokens(tokenizer)
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self._num_chars = 0  # complete ones, so far

    def prompt(self, ids: Sequence[int], delta: OutputDelta) -> Lists:
        """Of an echoed prompt. Its first token has no log probability: nothing precedes it."""
        num_unknown = len(ids) - len(delta.prompt_logprobs)
        logprobs = [*[None] * num_unknown, *delta.prompt_logprobs]
        tops = [*[()] * num_unknown, *(delta.prompt_tops or [()] * len(delta.prompt_logprobs))]
        lists = self._lists(ids, logprobs, tops)
        self._num_chars += len(self._decode(b"", True))
        return lists

    def answer(self, delta: OutputDelta) -> Lists | None:
        """Of an answer, whole or in part. None where the engine was not asked."""
        if len(delta.logprobs) < len(delta.token_ids):
            return None
        count = self._shown.count(delta, cuts=delta.matched_stop is not None)
        tops = delta.tops or ((),) * count
        return self._lists(delta.token_ids[:count], delta.logprobs[:count], tops[:count])

    def _lists(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[TopLogprobs]
    ) -> Lists:
        lists: Lists = {name: [] for name in LIST_NAMES}
        for token_id, logprob, top in zip(ids, logprobs, tops, strict=True):
            lists["tokens"].append(self._name(token_id))
            lists["token_logprobs"].append(logprob)
            ranked = None if logprob is None else self._ranked(token_id, logprob, top)
            lists["top_logprobs"].append(ranked)
            lists["text_offset"].append(self._num_chars)
            self._num_chars += len(self._decode(self._shown.bytes_of(token_id)))
        return lists

    def _ranked(self, token_id: int, logprob: float, top: TopLogprobs) -> dict[str, float]:
        """The token itself always is among them."""
        found = dict(top) | {token_id: logprob}
        ranked = sorted(found.items(), key=lambda item: -item[1])
        return {self._name(other): value for other, value in ranked}

    def _name(self, token_id: int) -> str:
        if not self._shown.is_known(token_id):
            return f"token_id:{token_id}"
        data = self._shown.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatLogprobs:
    """The `logprobs` of one choice of a chat, piece by piece: of the tokens of its content."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._shown = ShownTokens(tokenizer)

    def answer(self, delta: OutputDelta) -> dict[str, object] | None:
        """Whole or in part. None where the engine was not asked."""
        if len(delta.logprobs) < len(delta.token_ids):
            return None
        count = self._shown.count(delta, cuts=True)
        tops = delta.tops or ((),) * count
        shown = zip(delta.token_ids[:count], delta.logprobs[:count], tops[:count], strict=True)
        content = [
            self._entry(token_id, logprob) | {"top_logprobs": self._ranked(top)}
            for token_id, logprob, top in shown
        ]
        return {"content": content, "refusal": None}

    def _ranked(self, top: TopLogprobs) -> list[dict[str, object]]:
        ranked = sorted(dict(top).items(), key=lambda item: -item[1])
        return [self._entry(token_id, logprob) for token_id, logprob in ranked]

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        data = self._shown.bytes_of(token_id)
        is_known = self._shown.is_known(token_id)
        token = data.decode("utf-8", "replace") if is_known else f"token_id:{token_id}"
        return {"token": token, "logprob": logprob, "bytes": list(data) if is_known else None}


def joined(first: Lists | None, second: Lists | None) -> Lists | None:
    """Both as one."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in LIST_NAMES}


def candidate_ids(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens whose log probabilities are asked for by their texts, each once.

    Raises ApiError 400 for what is not one token.
    """
    if len(texts) > MAX_NUM_CANDIDATES:
        raise invalid(
            f"'candidate_token_texts' has {len(texts)} texts, at most {MAX_NUM_CANDIDATES} are "
            "supported",
            "candidate_token_texts",
        )
    found = []
    for text in texts:
        token_id = tokenizer.token_id(text.encode())
        if token_id is None:
            raise invalid(
                f"'candidate_token_texts' has {text!r}, which is not exactly one token of this "
                "model's vocabulary",
                "candidate_token_texts",
            )
        found.append(token_id)
    return tuple(dict.fromkeys(found))
