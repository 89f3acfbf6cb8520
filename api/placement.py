"""Which replica a request goes to, with its prompt in that replica's tokens.

Knows the registry and prompts; nothing is submitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.errors import invalid
from api.prompt import EncodedPrompt, Prompt, encode
from api.registry import ModelRegistry, Replica
from api.structured import NamedGrammar
from config.convert import did_you_mean
from engine.errors import InvalidRequest
from engine.types import StateInfo

PromptsFor = Callable[[Replica], Sequence[Prompt]]


@dataclass(frozen=True, slots=True)
class PlacedPrompt:
    prompt: Prompt
    encoded: EncodedPrompt


@dataclass(frozen=True, slots=True)
class Placed:
    """One prompt or more, all for the same replica."""

    replica: Replica
    prompts: tuple[PlacedPrompt, ...]


async def place(registry: ModelRegistry, model_name: str | None, prompts_for: PromptsFor) -> Placed:
    """Raises ApiError, and whatever `prompts_for` raises."""
    while True:
        replica = registry.get(model_name)
        prompts = prompts_for(replica)
        placed = [
            PlacedPrompt(prompt, await encode(prompt, replica.client.tokenizer))
            for prompt in prompts
        ]
        for grammar in prompts[0].grammars:
            await _prepare(replica, grammar)
        if registry.get(model_name) is replica:
            return Placed(replica, tuple(placed))
        # It was replaced meanwhile, maybe with another vocabulary.


async def _prepare(replica: Replica, grammar: NamedGrammar) -> None:
    try:
        await replica.client.prepare(grammar.source)
    except InvalidRequest as error:
        raise invalid(f"{grammar.field!r} cannot be followed: {error}", grammar.field) from None


def initial_state_of(replica: Replica, given: str | None, base: str | None) -> str | None:
    """The tuned state that a text begins with: the given one or the configured one.

    None where it goes on from the state `base`. Raises ApiError 400 for an unknown one.
    """
    if base is not None:
        return None
    known = replica.client.info.initial_states
    if given is not None and given not in known:
        hint = did_you_mean(given, known)
        raise invalid(f"'initial_state' = {given!r} is not configured{hint}", "initial_state")
    return given or replica.table.initial_state


def follows_text(base: StateInfo | None) -> bool:
    """Whether something is before the prompt that a new message must be set apart from.

    A state of one token is that of the begin-of-document token.
    """
    return base is not None and base.num_tokens > 1
