"""EmbeddingBody: the fields of POST /v1/embeddings. Knows neither engine nor socket."""

from __future__ import annotations

from typing import Literal

import msgspec

from api.errors import invalid
from api.generation_body import MAX_PRIORITY
from api.prompt import Prompt
from api.prompt_field import prompt_at, token_ids_at
from api.sampling import Integer, integer
from api.schemas import parse_strict

MAX_NUM_INPUTS = 2048  # OpenAI's

InputField = str | list[str | int | list[int]]


class EmbeddingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings; null = absent."""

    model: str | None = None
    input: InputField | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Integer | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    initial_state: str | None = None
    user: str | None = None

    @property
    def is_base64(self) -> bool:
        return self.encoding_format == "base64"

    @property
    def rank(self) -> int:
        return integer("priority", self.priority or 0, -MAX_PRIORITY, MAX_PRIORITY)

    def prompts(self) -> list[Prompt]:
        """One for each embedding. Raises ApiError 400 that names the place."""
        given = self.input
        if given is None:
            raise invalid("'input' is missing: send a text, or a list of texts", "input")
        if isinstance(given, str):
            return [Prompt("input", given)]
        if given and all(isinstance(item, int) for item in given):
            return [Prompt("input", token_ids_at("input", given))]
        if not given:
            raise invalid("'input' is empty: send at least one text", "input")
        if len(given) > MAX_NUM_INPUTS:
            raise invalid(
                f"'input' has {len(given)} texts, at most {MAX_NUM_INPUTS} are taken at once",
                "input",
            )
        return [prompt_at(f"input[{index}]", item) for index, item in enumerate(given)]

    def check_dimensions(self, num_dimensions: int) -> None:
        """Raises ApiError 400 for another length than the model's."""
        if self.dimensions is not None and self.dimensions != num_dimensions:
            raise invalid(
                f"'dimensions' = {self.dimensions}, but embeddings of this model have "
                f"{num_dimensions}, and it was not trained to say less in fewer: leave it out",
                "dimensions",
            )


def parse_embedding(data: bytes) -> EmbeddingBody:
    """Raises ApiError 400 that names the first field in the way."""
    return parse_strict(data, EmbeddingBody)
