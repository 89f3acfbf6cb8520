"""From a chat's body to its prompt, and to what its answer looks like. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from api.answer_reader import AnswerForm, answer_lead, thought_lead
from api.chat import ChatMessage, Template, render
from api.errors import invalid
from api.placement import follows_text
from api.prompt import Prompt
from api.schemas import ChatBody
from api.structured import NamedGrammar, NamedPart
from api.tool_text import ToolUse, arguments_part, tools_grammar
from engine.types import StateInfo


def chat_prompt(
    body: ChatBody, messages: Sequence[ChatMessage], template: Template, base: StateInfo | None
) -> Prompt:
    """`base` is the state that it goes on from. Raises ApiError 400."""
    use = body.tool_use()
    check_template(messages, template, has_tools=use is not None)
    rendered = render(
        messages,
        template,
        is_continuation=follows_text(base),
        # Without a message the answer goes on in the middle, where white space counts.
        asks_answer=body.asks_answer and (base is None or bool(messages)),
        continues_last=body.continues_last,
        thinking=body.thinking(template),
        tools=() if use is None else use.tools,
    )
    structure = body.structure()
    grammars = []
    if use is not None:
        grammars = _tool_grammars(use, structure, thought_lead(rendered.ending))
    elif structure is not None:
        grammars = [structure.behind(answer_lead(rendered.ending, rendered.form.joint))]
    has_text = use is None or not use.must_call
    is_free = has_text and structure is None
    return Prompt(
        "messages",
        rendered.text,
        rendered.form.stops if is_free else (),  # otherwise the grammar ends the answer
        starts=rendered.starts,
        is_continuation=base is not None,
        form=AnswerForm(rendered.ending, has_calls=use is not None, has_text=has_text),
        grammars=grammars,
    )


def check_template(
    messages: Sequence[ChatMessage], template: Template, *, has_tools: bool = False
) -> None:
    """Raise ApiError 400 for what the template has no form for."""
    if template == "g1":
        return
    remedy = 'the template of this model (rwkv-rs) has none; configure template = "g1"'
    if has_tools:
        raise invalid(f"'tools': {remedy}", "tools")
    for index, message in enumerate(messages):
        if message.calls:
            field = f"messages[{index}].tool_calls"
            raise invalid(f"'{field}': {remedy}", field)


def _tool_grammars(use: ToolUse, structure: NamedPart | None, lead: str) -> list[NamedGrammar]:
    """The parts, so that errors name them, and the whole."""
    parts = [
        NamedPart(f"tools[{index}].function.parameters", arguments_part(tool))
        for index, tool in enumerate(use.tools)
    ]
    if structure is not None:
        parts.append(structure)
    grammars = [part.behind() for part in parts]
    whole = tools_grammar(use, lead, None if structure is None else structure.part)
    return [*grammars, NamedGrammar("tools", whole)]
