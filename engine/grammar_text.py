"""What answers may be asked to match, written down for engine/grammar.py. Pure text.

The language is that of llguidance: a list of grammars as JSON, of which the first is the start
and names the others; each is a Lark grammar or a JSON schema. `lead` is a regular expression of
what comes before the answer itself, matched as short as possible. What is no JSON, or is nested
hundreds of levels deep, raises ValueError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import orjson

Part = Mapping[str, object]

# One space, or one new line and its indentation: unlimited white space would let a model that
# knows no better write it for ever, and a blank line separates turns in RWKV's chats.
WHITESPACE = r" |\n[ \t]{0,40}"
ANSWER = "answer"


def json_schema(schema: object, lead: str = "", *, is_lenient: bool = False) -> str:
    """JSON that the schema describes. What it says that cannot be enforced is an error, or with
    `is_lenient` ignored."""
    return behind(lead, schema_part(schema, is_lenient=is_lenient))


def regex(pattern: str, lead: str = "") -> str:
    """A text that the whole pattern matches, in the syntax of Rust's regex crate."""
    return behind(lead, regex_part(pattern))


def choice(texts: Sequence[str], lead: str = "") -> str:
    """One of the texts."""
    return behind(lead, choice_part(texts))


def lark(grammar: str, lead: str = "") -> str:
    """A text of a context-free grammar, in llguidance's variant of Lark; it begins at `start`."""
    return behind(lead, lark_part(grammar))


def behind(lead: str, part: Part) -> str:
    """A grammar of one part."""
    if not lead:
        return _dump(part)
    start = f"start: lead @{ANSWER}\nlead[lazy]: /{lark_regex(lead)}/"
    return compose(start, {ANSWER: part})


def compose(start: str, parts: Mapping[str, Part]) -> str:
    """A Lark grammar that names others as @NAME."""
    return _dump({"lark_grammar": start}, *({"name": name, **part} for name, part in parts.items()))


def schema_part(schema: object, *, is_lenient: bool = False) -> Part:
    options = {"whitespace_pattern": WHITESPACE, "lenient": is_lenient}
    if isinstance(schema, dict):
        return {"json_schema": {**schema, "x-guidance": options}}
    return {"json_schema": {"allOf": [schema], "x-guidance": options}}


def regex_part(pattern: str) -> Part:
    return lark_part(f"start: /{lark_regex(pattern)}/")


def choice_part(texts: Sequence[str]) -> Part:
    """As one regular expression: thousands of alternatives are quick to follow there."""
    return regex_part("|".join(map(re.escape, texts)))


def lark_part(grammar: str) -> Part:
    return {"lark_grammar": grammar}


def lark_text(text: str) -> str:
    """A string literal."""
    return json.dumps(text, ensure_ascii=False)


def lark_regex(pattern: str) -> str:
    """A pattern between slashes."""
    return re.sub(
        r"\\.|/|\n", lambda found: ESCAPES.get(found[0], found[0]), pattern, flags=re.DOTALL
    )


ESCAPES = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}


def _dump(*parts: Part) -> str:
    try:
        return orjson.dumps({"grammars": parts}).decode()
    except orjson.JSONEncodeError as error:
        raise ValueError(f"it has no JSON form: {error}") from None
