"""From a conversation to its prompt, and to what its answer looks like, whatever the protocol.

Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from api.answer_reader import AnswerForm, answer_lead, thought_lead
from api.chat import ChatMessage, Template, render
from api.conversation import ConversationBody
from api.errors import invalid
from api.placement import follows_text
from api.prompt import Prompt
from api.structured import NamedGrammar, NamedPart
from api.tool_text import ToolUse, arguments_part, tools_grammar
from engine.types import StateInfo


def chat_prompt(
    body: ConversationBody,
    messages: Sequence[ChatMessage],
    template: Template,
    base: StateInfo | None = None,
    *,
    has_told_tools: bool = False,
) -> Prompt:
    """`base` is the state that it goes on from. Raises ApiError 400.

    With `has_told_tools` the model knows the tools, from `base` or from `messages`.
    """
    use = body.tool_use()
    check_template(messages, template, has_tools=use is not None, calls_field=body.CALLS_FIELD)
    rendered = render(
        messages,
        template,
        is_continuation=follows_text(base),
        # Without a message the answer goes on in the middle, where white space counts.
        asks_answer=body.asks_answer and (base is None or bool(messages)),
        continues_last=body.continues_last,
        thinking=body.thinking_for(template),
        tools=() if use is None or has_told_tools else use.tools,
        has_tool_form=has_told_tools,
    )
    structure = body.structure()
    grammars = []
    if use is not None:
        grammars = _tool_grammars(use, structure, thought_lead(rendered.ending))
    elif structure is not None:
        grammars = [structure.behind(answer_lead(rendered.ending, rendered.form.joint))]
    has_text = use is None or not use.must_call
    is_free = has_text and structure is None  # otherwise the grammar ends the answer
    return Prompt(
        body.CONVERSATION_FIELD,
        rendered.text,
        (*body.added_stops, *(rendered.form.stops if is_free else ())),
        starts=rendered.starts,
        is_continuation=base is not None,
        form=AnswerForm(rendered.ending, has_calls=use is not None, has_text=has_text),
        grammars=grammars,
    )


def check_template(
    messages: Sequence[ChatMessage],
    template: Template,
    *,
    has_tools: bool = False,
    calls_field: str = ConversationBody.CALLS_FIELD,
) -> None:
    """Raise ApiError 400 for what the template has no form for."""
    if template == "g1":
        return
    remedy = 'the template of this model (rwkv-rs) has none; configure template = "g1"'
    if has_tools:
        raise invalid(f"'tools': {remedy}", "tools")
    for index, message in enumerate(messages):
        if message.calls:
            field = calls_field.format(index)
            raise invalid(f"'{field}' has calls: {remedy}", field)


def _tool_grammars(use: ToolUse, structure: NamedPart | None, lead: str) -> list[NamedGrammar]:
    """The parts, so that errors name them, and the whole."""
    parts = [NamedPart(tool.field, arguments_part(tool)) for tool in use.tools]
    if structure is not None:
        parts.append(structure)
    grammars = [part.behind() for part in parts]
    whole = tools_grammar(use, lead, None if structure is None else structure.part)
    return [*grammars, NamedGrammar("tools", whole)]
