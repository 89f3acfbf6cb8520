"""The Jinja templates that clients may render give the prompts of the server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from api.chat import ChatMessage, Template, render
from api.chat_jinja import JINJA
from api.schemas import MessageBody, chat_messages

# As lm-eval and transformers set it up.
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
TEXTS = st.text(st.sampled_from("ab:<>{}% \t\n\r\v\f\x1c\x85  "), max_size=30)
THOUGHTS = st.sampled_from(
    ("", " <think>", "<think>a\n\nb</think>", "<think></think>\n<think></think>")
)
MESSAGES = st.lists(
    st.builds(
        MessageBody,
        role=st.sampled_from(("user", "Assistant ", "system", "DEVELOPER")),
        content=st.builds("{}{}".format, THOUGHTS, TEXTS) | st.none(),
    ),
    min_size=1,
    max_size=4,
)


class TemplateRaised(Exception):
    pass


def raise_exception(message: str) -> None:
    raise TemplateRaised(message)


ENVIRONMENT.globals["raise_exception"] = raise_exception


def rendered(messages: list[dict[str, object]], template: Template, asks_answer: bool) -> str:
    found = ENVIRONMENT.from_string(JINJA[template])
    return found.render(messages=messages, add_generation_prompt=asks_answer)


@pytest.mark.parametrize("template", list(JINJA))
@given(bodies=MESSAGES, asks_answer=st.booleans())
def test_both_say_the_same(template: Template, bodies: list[MessageBody], asks_answer: bool):
    expected = render(chat_messages(bodies), template, asks_answer=asks_answer).text
    given = [{"role": body.role, "content": body.content} for body in bodies]
    assert rendered(given, template, asks_answer) == expected


@pytest.mark.parametrize("template", list(JINJA))
def test_parts_are_joined_by_lines(template: Template):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    expected = render([ChatMessage("user", "one\ntwo")], template).text
    assert rendered([{"role": "user", "content": parts}], template, True) == expected


def test_a_result_of_a_tool_is_read_as_the_users_where_there_are_no_tools():
    expected = render([ChatMessage("tool", "4")], "rwkv-rs").text
    assert rendered([{"role": "tool", "content": "4"}], "rwkv-rs", True) == expected


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize("message", [CALL, {"role": " Tool", "content": "4"}])
def test_tools_are_refused_rather_than_rendered_otherwise(message: dict[str, object]):
    with pytest.raises(TemplateRaised, match="/v1/chat/completions/render"):
        rendered([{"role": "user", "content": "2+2?"}, message], "g1", True)
