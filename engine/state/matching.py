"""Matching: which page a prompt begins from, and whether it is there yet. Integers only."""

from __future__ import annotations

from collections.abc import Iterator

from engine.sequence import Sequence, SequenceStatus
from engine.state.owners import PrefillOwners, is_awaiting
from engine.state.page import Page
from engine.state.prefix import PrefixIndex, digest_of, extend, root
from engine.state.tiers import PageTiers


class Matching:
    """`seed` names everything besides tokens and salt that a state depends on. None: prompts
    begin from nothing, or from the state that they are to go on from."""

    def __init__(
        self,
        tiers: PageTiers,
        index: PrefixIndex,
        owners: PrefillOwners,
        seed: bytes | None,
        *,
        paragraph_len: int,
        min_awaited_tokens: int,
    ) -> None:
        """`min_awaited_tokens`: what another's snapshot must save to be waited for."""
        self._tiers = tiers
        self._index = index
        self._owners = owners
        self._seed = seed
        self._paragraph_len = paragraph_len
        self._min_awaited_tokens = min_awaited_tokens

    def match(self, seq: Sequence) -> tuple[Page | None, int]:
        """The deepest page to begin from, and the tokens of the prompt that it saves.

        All of them where the page has logits. A page of the cache that has to come from the disk
        counts only for who has not asked there yet, and none that is past tokens whose rows or
        log probabilities are wanted.
        """
        self.chain_up(seq)
        if seq.num_prompt_tokens == 0:
            return seq.base, 0
        most = seq.max_reused_tokens
        page = self._index.get(seq.end_digest) if most == seq.num_prompt_tokens else None
        if page is not None and page.has_logits and self._is_usable(seq, page):
            return page, seq.num_prompt_tokens
        most = min(most, seq.num_prompt_tokens - 1)
        for page, num_tokens in self._beginnings(seq, most):
            if self._is_usable(seq, page):
                return page, num_tokens
        return seq.base, 0

    def _beginnings(self, seq: Sequence, most: int) -> Iterator[tuple[Page, int]]:
        """The pages to begin from and the tokens that they save, at most so many, deepest first."""
        branch_at = seq.request.branch_at or 0
        branch = self._index.get(seq.branch_digest) if 0 < branch_at <= most else None
        for page, num_tokens in self._index.matches(seq.chain, most):
            if branch is not None and branch_at >= num_tokens:
                yield branch, branch_at
                branch = None
            yield page, num_tokens
        if branch is not None:
            yield branch, branch_at

    def must_wait(self, seq: Sequence) -> bool:
        """What the sequence begins from is on its way: from another sequence, or from the disk.

        Once per sequence for either, and the one waited for runs and the worker answers, so
        nobody waits for ever: a state that the prompt goes on from is asked for until it is here.
        """
        if seq.status is SequenceStatus.SWAPPED:
            return not seq.is_settled or not self._is_near(seq.parked)
        page, num_tokens = self.match(seq)
        if seq.keeps_prompt and self._lacks_frame(page):
            return True  # its state could not be kept; those who have the frames go on meanwhile
        if self._seed is not None and self._is_owned(seq, num_tokens):
            return True
        if page is not None and page is not seq.base and self._is_far(page):
            if self._is_fetching(page, num_tokens):
                return True
            seq.has_fetched = True  # go without it
            page, _ = self.match(seq)
        return not self._is_near(page)

    def may_share(self, first: Sequence, second: Sequence) -> bool:
        """The two prompts begin alike, as far as anybody could leave a snapshot for the other."""
        self.chain_up(second)
        return first.chain[1:2] == second.chain[1:2] or first.end_digest == second.end_digest

    def _is_usable(self, seq: Sequence, page: Page) -> bool:
        return page.slot is not None or page.frame is not None or not seq.has_fetched

    def _is_near(self, page: Page | None) -> bool:
        """The page can be begun from now. One that must be held and is in a file is asked for."""
        if page is None or not page.exists or page.slot is not None or self._tiers.is_settled(page):
            return True
        if page.frame is None and not self._tiers.files.is_reading(page):
            self._tiers.fetch(page)
        return False

    def _lacks_frame(self, page: Page | None) -> bool:
        """There is no frame for a state to keep beside that of the page to begin from."""
        has_frame = page is not None and page in self._tiers.in_host
        return self._tiers.num_frames_available <= has_frame

    def _is_far(self, page: Page) -> bool:
        """The page is in a file only, if anywhere."""
        return self._seed is not None and page.slot is None and page.frame is None

    def _is_fetching(self, page: Page, num_tokens: int) -> bool:
        """It is being read from its file: for others already, or now if it saves enough."""
        files = self._tiers.files
        if files.is_reading(page):
            return True
        return num_tokens >= files.min_tokens and self._tiers.fetch(page)

    def _is_owned(self, seq: Sequence, num_cached: int) -> bool:
        """Somebody is computing what this prompt begins with, beyond the tokens that are there,
        and will leave it."""
        if seq.awaited is None:
            if num_cached == seq.num_prompt_tokens:
                return False
            seq.awaited = self._owners.ask(seq, num_cached + self._min_awaited_tokens)
        return is_awaiting(seq)

    def chain_up(self, seq: Sequence) -> None:
        """Name the beginnings of its prompt, once."""
        if self._seed is None or seq.chain:
            return
        base = b"" if seq.base is None else seq.base.digest
        seq.chain.append(root(self._seed, seq.request.cache_salt, base))
        extend(seq.chain, seq.tokens, seq.num_prompt_tokens, self._paragraph_len)
        text = (seq.chain, seq.tokens)
        seq.end_digest = digest_of(*text, seq.num_prompt_tokens, self._paragraph_len)
        if seq.request.branch_at is not None:
            seq.branch_digest = digest_of(*text, seq.request.branch_at, self._paragraph_len)
