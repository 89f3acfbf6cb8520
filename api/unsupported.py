"""Known request fields that would change the answer and are not honoured yet.

They are refused rather than dropped. A field passes when it is null or has a value listed here,
which is the one that asks for nothing. Fields in no list are ignored, as rwkv-rs does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from api.errors import invalid

MAX_SHOWN_CHARS = 60

SHARED: dict[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
CHAT: dict[str, tuple[object, ...]] = SHARED | {
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
COMPLETIONS: dict[str, tuple[object, ...]] = SHARED | {
    "suffix": ("",),
    "top_logprobs": (0,),
}


def refuse_unsupported(body: Mapping[str, object], table: Mapping[str, tuple[object, ...]]) -> None:
    """Raise ApiError 400 for the first field that asks for what is not there yet."""
    for name, value in body.items():
        neutral = table.get(name)
        if neutral is None or value is None or any(_same(value, other) for other in neutral):
            continue
        shown = json.dumps(value, ensure_ascii=False)
        if len(shown) > MAX_SHOWN_CHARS:
            shown = shown[:MAX_SHOWN_CHARS] + "..."
        accepted = " or ".join(json.dumps(other) for other in neutral)
        remedy = f"leave it out or send {accepted}" if neutral else "leave it out"
        message = f"{name!r} = {shown} is not supported yet; {remedy}"
        raise invalid(message, param=name, code="unsupported_parameter")


def _same(value: object, other: object) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other
