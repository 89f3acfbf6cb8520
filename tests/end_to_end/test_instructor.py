"""The server as users of instructor see it: objects of their classes, in each of its ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from tests.end_to_end.site import MODEL, Server

instructor = pytest.importorskip(
    "instructor",
    reason="instructor is not installed: it has an environment of its own, `make clients`",
)

ASK = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Where is the cat?"}],
    "max_tokens": 200,
    "max_retries": 0,
    "temperature": 1,
    "seed": 1,
}


EMPTY_OBJECT = [1 + byte for byte in b"{}"]  # the token of a byte


class Place(BaseModel):
    """Where something is. Without `extra` a model may invent other properties, and no end."""

    model_config = ConfigDict(extra="forbid")
    room: str = Field(max_length=12)
    is_inside: bool


@pytest.fixture
def client(quiet_server: Server) -> Iterator[OpenAI]:
    url = f"{quiet_server.process.address}/v1"
    with OpenAI(base_url=url, api_key="sk-one", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_what_a_grammar_enforces_is_right_at_once(client: OpenAI, mode: str):
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    for seed in range(3):
        place = patched.chat.completions.create(**ASK | {"seed": seed}, response_model=Place)
        assert isinstance(place, Place)


def test_partial_objects_grow(client: OpenAI):
    patched = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    grown = list(patched.chat.completions.create_partial(**ASK, response_model=Place))
    rooms = [place.room or "" for place in grown]
    assert len(set(rooms)) > 1
    assert all(later.startswith(room) for room, later in pairwise(rooms))
    Place.model_validate(grown[-1].model_dump())


def test_json_mode_asks_in_words_and_is_tried_again(client: OpenAI):
    """No schema reaches the server: what comes is JSON, and the class refuses it."""
    from instructor.core import InstructorRetryException

    patched = instructor.from_openai(client, mode=instructor.Mode.JSON)
    answers: list[Any] = []
    patched.on("completion:response", answers.append)
    bias = {str(token): 100 for token in EMPTY_OBJECT}
    with pytest.raises(InstructorRetryException) as caught:
        patched.chat.completions.create(
            **ASK | {"max_retries": 1, "logit_bias": bias}, response_model=Place
        )
    texts = [answer.choices[0].message.content for answer in answers]
    assert caught.value.n_attempts == len(texts) == 2
    assert all(json.loads(text) == {} for text in texts)
