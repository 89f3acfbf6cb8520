"""Messages as the prompt of a replica. Knows templates, no bodies and no routes."""

from __future__ import annotations

from collections.abc import Sequence

from api.answer_reader import answer_lead
from api.chat import ChatMessage, render
from api.placement import follows_text
from api.prompt import Prompt
from api.registry import Replica
from api.structured import NamedPart
from engine.types import StateInfo


def conversation_prompt(
    field: str,
    messages: Sequence[ChatMessage],
    replica: Replica,
    base: StateInfo | None = None,
    *,
    asks_answer: bool = True,
    stops: Sequence[str] = (),
    structure: NamedPart | None = None,
) -> Prompt:
    """What is to be continued after the state `base`, as far as there is one.

    `stops` end the answer besides what ends a turn, or what `structure` says of its form; `field`
    is what errors name.
    """
    template = replica.table.template
    rendered = render(
        messages, template, is_continuation=follows_text(base), asks_answer=asks_answer
    )
    grammars = []
    if structure is not None:
        grammars.append(structure.behind(answer_lead(rendered.ending, rendered.form.joint)))
    return Prompt(
        field,
        rendered.text,
        stops if grammars else (*stops, *rendered.form.stops),
        starts=rendered.starts,
        is_continuation=base is not None,
        grammars=grammars,
    )
