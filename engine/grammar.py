"""Grammars: what the text of an answer must match, compiled once and followed token by token.

The library is llguidance (guidance-ai): no dependencies, masks in tens of microseconds, and it
refuses the parts of JSON Schema that it cannot enforce. Knows tokens, neither logits nor requests;
engine/grammar_text.py writes the grammars.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from time import thread_time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.errors import InvalidRequest
from engine.tokenizer import END_OF_TEXT, Tokenizer

MAX_SOURCE_CHARS = 256 * 1024
MAX_NUM_COMPILED = 256
MAX_COMPILED_CHARS = 512 * 1024  # of their sources; one takes up to 400 bytes for each
MAX_GRAMMAR_SIZE = 100_000  # symbols
MAX_ITEMS_IN_ROW = 20_000  # alternatives at one place
MAX_LEXER_STATES = 50_000  # some 2 kB each
MAX_ERROR_CHARS = 500
# A mask takes 0.2 ms at most in any grammar that means something. A literal of 100,000 characters
# takes tens of milliseconds for each, in steps that others share.
MAX_MASK_S = 0.01  # of processor time, on average
NUM_MEASURED = 16  # so many masks are waited for first


class Matcher:
    """How far one answer has come in its grammar. Used by one thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_masks = 0
        self._spent_s = 0.0

    def allowed(self) -> bytes:
        """One bit per token id, the lowest bit of the first byte being id 0: what may come next.

        Id 0 may where the text can end. None may where the limits of the library were met, or
        where masks take too long.
        """
        began_s = thread_time()
        mask: bytes = self._matcher.compute_bitmask()  # without the interpreter's lock
        self._spent_s += thread_time() - began_s
        self._num_masks += 1
        return bytes(len(mask)) if self._matcher.is_error() or self._is_slow else mask

    @property
    def _is_slow(self) -> bool:
        return self._num_masks >= NUM_MEASURED and self._spent_s > MAX_MASK_S * self._num_masks

    def update(self, tokens: Sequence[int]) -> None:
        """These were drawn. What the grammar does not allow breaks the matcher."""
        for token in tokens:
            self._matcher.consume_token(token)


class GrammarCompiler:
    """The grammars of one vocabulary. Safe to use from any thread.

    Those used last are kept. A compiled grammar is copied for each answer, in some 10 µs.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's. Takes 0.2 s for the World vocabulary, in which no other
        Python code runs."""
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)), n_vocab=vocab_size
        )
        self._limits = LLParserLimits(
            max_items_in_row=MAX_ITEMS_IN_ROW,
            max_grammar_size=MAX_GRAMMAR_SIZE,
            max_lexer_states=MAX_LEXER_STATES,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._num_chars = 0  # of the sources kept
        self._lock = Lock()

    async def prepare(self, grammar: str) -> None:
        """Compile in a thread, so that `matcher` has it at hand. Raises InvalidRequest."""
        if self._kept(grammar) is None:
            await asyncio.to_thread(self._compile, grammar)

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of the grammar. Raises InvalidRequest that says what is wrong."""
        return Matcher((self._kept(grammar) or self._compile(grammar)).deep_copy())

    def _kept(self, grammar: str) -> LLMatcher | None:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        return found

    def _compile(self, grammar: str) -> LLMatcher:
        if len(grammar) > MAX_SOURCE_CHARS:
            raise InvalidRequest(
                f"the grammar has {len(grammar)} characters, at most {MAX_SOURCE_CHARS} are"
                " supported",
                "grammar",
            )
        try:
            grammar.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the grammar has a lone surrogate; remove it", "grammar") from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        matcher.compute_bitmask()  # so that no answer pays for the first states of the lexer
        if matcher.is_error():
            raise InvalidRequest(matcher.get_error()[:MAX_ERROR_CHARS].strip(), "grammar")
        self._keep(grammar, matcher)
        return matcher

    def _keep(self, grammar: str, matcher: LLMatcher) -> None:
        with self._lock:
            if grammar not in self._compiled:
                self._num_chars += len(grammar)
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_NUM_COMPILED or self._num_chars > MAX_COMPILED_CHARS:
                oldest, _ = self._compiled.popitem(last=False)
                self._num_chars -= len(oldest)


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    eos_token_id = END_OF_TEXT
    bos_token_id = None
    special_token_ids = (END_OF_TEXT,)

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [
            tokenizer.token_bytes(token) if tokenizer.has_text(token) else b""
            for token in range(vocab_size)
        ]
        self._encode = tokenizer.encode_bytes

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.encode() if isinstance(text, str) else text)
