"""From token ids to the text a client may see, for one request. Knows no scheduler and no stream.

Text leaves as early as it is certain: what is held back is an unfinished character, and the end
of the text as long as it can still become a stop string.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from engine.tokenizer import Tokenizer


class TextOutput:
    """The text of one request, token by token.

    Stop strings are looked for in bytes, so they may cross token borders. After each token the
    stop string that begins earliest in the text wins, the longest of those that begin together.
    It and what follows it are removed; text in front of it is kept. Empty ones are ignored.
    Bytes that are not UTF-8 give U+FFFD exactly as `bytes.decode` with "replace" does.

    A stop string that is complete within the first `min_tokens` tokens is text like any other.
    With `includes_stop` it is not removed, only what follows it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        includes_stop: bool = False,
    ) -> None:
        """Raises ValueError for a stop string that has no UTF-8 form (a lone surrogate)."""
        self.matched_stop: str | None = None
        self.num_emitted_bytes = 0  # certain to be text; up to the stop string where one was found
        self._token_bytes = tokenizer.token_bytes
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self._scanner = StopScanner(map(_stop_bytes, filter(None, stop))) if any(stop) else None
        self._held = b""  # may begin a stop string; not yet given to the decoder
        self._num_free_tokens = min_tokens  # still to come, that may hold a stop string
        self._includes_stop = includes_stop

    @property
    def num_held_bytes(self) -> int:
        """At the end of what was pushed: they may turn out to begin a stop string."""
        return len(self._held)

    def push(self, token_id: int) -> str:
        """Text that became certain; "" if none did. Id 0 gives nothing.

        Raises ValueError for an id that the vocabulary does not have.
        """
        assert self.matched_stop is None, "a token behind the stop string"
        token = self._token_bytes(token_id)
        if self._scanner is None:
            self.num_emitted_bytes += len(token)
            return self._decode(token)
        match, num_held = self._scanner.scan(token)
        text = self._held + token
        self._num_free_tokens -= 1
        if match is not None and self._num_free_tokens < 0:
            distance, stop = match
            self.matched_stop = stop.decode()
            self._held = b""
            kept = len(text) - distance + (len(stop) if self._includes_stop else 0)
            self.num_emitted_bytes += kept
            return self._decode(text[:kept], True)
        certain = len(text) - num_held
        self.num_emitted_bytes += certain
        self._held = text[certain:]
        return self._decode(text[:certain])

    def finish(self) -> str:
        """What was held back, for a request that ends now; an unfinished character is U+FFFD.

        Gives "" after a stop string was matched.
        """
        held, self._held = self._held, b""
        self.num_emitted_bytes += len(held)
        return self._decode(held, True)


def first_bytes(tokenizer: Tokenizer, ids: Sequence[int], num_bytes: int) -> list[int]:
    """The tokens of the first `num_bytes` bytes of a text; what is left of a token that is cut
    there comes in tokens of its own."""
    kept: list[int] = []
    for token_id in ids:
        token = tokenizer.token_bytes(token_id)
        if len(token) > num_bytes:
            return kept + tokenizer.encode_bytes(token[:num_bytes])
        kept.append(token_id)
        num_bytes -= len(token)
    return kept


class StopScanner:
    """Finds byte strings in a stream that comes in pieces: an Aho-Corasick automaton.

    A state is a prefix of some stop string, namely the longest one the stream now ends with;
    state 0 is the empty prefix. Each byte costs amortised constant time, however many stop
    strings there are and however long they are.
    """

    def __init__(self, stops: Iterable[bytes]) -> None:
        self._next: list[dict[int, int]] = [{}]  # per state: byte -> longer prefix
        self._depth: list[int] = [0]  # per state: length of the prefix
        self._ending: list[bytes] = [b""]  # per state: longest stop that ends here, or b""
        self._fallback: list[int] = [0]  # per state: its longest proper suffix that is a state
        self._state = 0
        for stop in stops:
            self._add(stop)
        self._link()
        self._first_bytes = frozenset(self._next[0])

    def scan(self, data: bytes) -> tuple[tuple[int, bytes] | None, int]:
        """Go on with the stream. Returns (match, num_held).

        match: among the stop strings that ended inside `data`, the one that begins earliest, the
        longest of equals: (how many bytes before the end of `data` it begins, itself); or None.
        num_held: how many bytes at the end of the stream may be the beginning of a stop string.
        """
        if self._state == 0 and self._first_bytes.isdisjoint(data):
            return None, 0
        match: tuple[int, bytes] | None = None
        remaining = len(data)
        for byte in data:
            self._state = self._step(self._state, byte)
            stop = self._ending[self._state]
            distance = remaining - 1 + len(stop)
            # >=: of two that begin together, the one that ends later is the longer
            if stop and (match is None or distance >= match[0]):
                match = distance, stop
            remaining -= 1
        return match, self._depth[self._state]

    def _step(self, state: int, byte: int) -> int:
        while state and byte not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(byte, 0)

    def _add(self, stop: bytes) -> None:
        state = 0
        for byte in stop:
            if byte not in self._next[state]:
                self._next[state][byte] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._ending.append(b"")
                self._fallback.append(0)
            state = self._next[state][byte]
        self._ending[state] = stop

    def _link(self) -> None:
        """Set the fallbacks, shorter prefixes first: each needs those of all shorter ones."""
        level = list(self._next[0].values())
        while level:
            deeper: list[int] = []
            for state in level:
                for byte, child in self._next[state].items():
                    fallback = self._step(self._fallback[state], byte)
                    self._fallback[child] = fallback
                    self._ending[child] = self._ending[child] or self._ending[fallback]
                    deeper.append(child)
            level = deeper


def _stop_bytes(stop: str) -> bytes:
    try:
        return stop.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"stop string {stop!r} has a lone surrogate: it has no UTF-8 form and can never "
            "occur in the text; remove it"
        ) from None
