"""ScoreBody: the fields of POST /v1/completions/score. Knows neither engine nor socket."""

from __future__ import annotations

import msgspec

from api.errors import invalid
from api.generation_body import MAX_PRIORITY
from api.prompt import Prompt
from api.prompt_field import prompt_at
from api.sampling import Integer, integer
from api.schemas import parse_strict

MAX_NUM_SCORED = 1024


class ScoreBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions/score; null = absent."""

    model: str | None = None
    prompt: str | list[int] | None = None
    choices: list[str | int | list[int]] | None = None
    state: str | None = None
    initial_state: str | None = None
    cache_salt: str | None = None
    priority: Integer | None = None

    @property
    def rank(self) -> int:
        return integer("priority", self.priority or 0, -MAX_PRIORITY, MAX_PRIORITY)

    @property
    def num_choices(self) -> int:
        return len(self.choices or ())

    def prompts(self, *, is_continuation: bool) -> list[Prompt]:
        """The prompt, then the choices. Raises ApiError 400 that names the place."""
        begin = Prompt("prompt", "", is_continuation=is_continuation)
        if self.prompt is not None:
            begin = prompt_at("prompt", self.prompt, is_continuation=is_continuation)
        return [
            begin,
            *(
                prompt_at(f"choices[{index}]", choice, is_continuation=True)
                for index, choice in enumerate(self.choices or ())
            ),
        ]

    def check(self) -> None:
        """Raises ApiError 400 for what is missing, too much, or does not go together."""
        if self.prompt is None and self.state is None:
            raise invalid("'prompt' is missing: send a text or a list of token ids", "prompt")
        if not self.choices:
            raise invalid("'choices' must be a list of at least one continuation", "choices")
        if self.num_choices > MAX_NUM_SCORED:
            raise invalid(
                f"'choices' has {self.num_choices} continuations, at most {MAX_NUM_SCORED} are "
                "taken at once",
                "choices",
            )
        empty = next((index for index, one in enumerate(self.choices) if one in ("", [])), None)
        if empty is not None:
            raise invalid(f"'choices[{empty}]' is empty: there is nothing to score", "choices")
        if self.state is not None and self.initial_state is not None:
            raise invalid("send 'state' or 'initial_state', not both", "initial_state")


def parse_score(data: bytes) -> ScoreBody:
    """Raises ApiError 400 that names the first field in the way."""
    body = parse_strict(data, ScoreBody)
    body.check()
    return body
