"""Bugs in what is said of prompts, and in prompts that draw nothing."""

from __future__ import annotations

from engine.plan import Targets
from engine.sequence import Sequence
from tests.engine.seeded_bugs import Bug, Patch


def scores_are_of_the_token_that_is_fed(patch: Patch) -> None:
    targets = Sequence.targets

    def shifted(self: Sequence, begin: int, end: int) -> Targets | None:
        found = targets(self, begin, end)
        if found is None or found.begin + len(found.token_ids) >= end - begin:
            return found
        return found._replace(begin=found.begin + 1)

    patch.setattr(Sequence, "targets", shifted)


def last_token_of_a_chunk_scores_nothing(patch: Patch) -> None:
    targets = Sequence.targets
    patch.setattr(Sequence, "targets", lambda self, begin, end: targets(self, begin, end - 1))


def scored_prompt_begins_behind_its_first_score(patch: Patch) -> None:
    most = Sequence.max_reused_tokens.fget
    assert most is not None
    patch.setattr(
        Sequence,
        "max_reused_tokens",
        property(lambda self: min(most(self) + 1, self.num_prompt_tokens)),
    )


def prompt_alone_leaves_its_frame(patch: Patch) -> None:
    """It takes one though nobody wants its state."""
    patch.setattr(Sequence, "keeps_prompt", property(lambda self: self.max_tokens == 0))


SCORE_BUGS: list[Bug] = [
    scores_are_of_the_token_that_is_fed,
    last_token_of_a_chunk_scores_nothing,
    scored_prompt_begins_behind_its_first_score,
    prompt_alone_leaves_its_frame,
]
