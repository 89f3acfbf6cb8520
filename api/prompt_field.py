"""Texts and token ids in lists of a body -> prompts, with errors that name the place."""

from __future__ import annotations

from collections.abc import Sequence

from api.errors import invalid
from api.prompt import Prompt
from api.sampling import MAX_TOKEN_ID

PromptItem = str | int | list[int]  # an int is refused by words, rather than by its type


def prompt_at(place: str, item: PromptItem, *, is_continuation: bool = False) -> Prompt:
    """Raises ApiError 400."""
    if isinstance(item, str):
        return Prompt(place, item, is_continuation=is_continuation)
    if isinstance(item, int):
        raise invalid(
            f"'{place}' is a token id among texts: send texts, or lists of token ids", place
        )
    return Prompt(place, token_ids_at(place, item))


def token_ids_at(place: str, given: Sequence[PromptItem]) -> tuple[int, ...]:
    """Raises ApiError 400 for what no vocabulary has, and for none at all."""
    ids = tuple(item for item in given if isinstance(item, int))
    if not ids:
        raise invalid(f"'{place}' has no token; a text may be empty, token ids may not", place)
    outside = next((token for token in ids if not 0 <= token <= MAX_TOKEN_ID), None)
    if outside is not None:
        raise invalid(f"'{place}' has the token id {outside}, which no vocabulary has", place)
    return ids
