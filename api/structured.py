"""StructuredFields: what a request says about the form of its answer -> a grammar's text.

OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_…`. Knows no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import orjson

from api.errors import invalid
from api.sampling import SamplingFields
from engine.grammar_text import Part, behind, choice_part, lark_part, regex_part, schema_part

Schema = dict[str, object] | bool
SchemaField = Schema | str  # also as a text, which vLLM takes
JSON_OBJECT: Schema = {"type": "object"}
FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True, slots=True)
class NamedGrammar:
    """A grammar and the field that errors about it name."""

    field: str
    source: str


@dataclass(frozen=True, slots=True)
class NamedPart:
    """Part of a grammar, and the field that errors about it name."""

    field: str
    part: Part

    def behind(self, lead: str = "") -> NamedGrammar:
        """As a grammar behind `lead`, a regular expression. Raises ApiError 400."""
        try:
            return NamedGrammar(self.field, behind(lead, self.part))
        except ValueError as error:
            raise invalid(f"{self.field!r} cannot be followed: {error}", self.field) from None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """`strict` makes no difference: what a schema says is enforced, or refused."""

    name: str | None = None
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's; exactly one is given."""

    json: SchemaField | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredFields(SamplingFields, kw_only=True):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaField | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structure(self) -> NamedPart | None:
        """What the answer must match; None for anything. Raises ApiError 400, also for two of the
        fields."""
        own = self.own_format()
        asked = [] if own is None else [own]
        asked += [*self._structured_outputs(), *self._guided()]
        if len(asked) > 1:
            first, second = asked[0].field, asked[1].field
            raise invalid(
                f"{first!r} and {second!r} both say what form the answer has; send one", second
            )
        return asked[0] if asked else None

    def own_format(self) -> NamedPart | None:
        """What the route's own field says. Raises ApiError 400."""
        asked = self.response_format
        if asked is None:
            return None
        schema = None if asked.json_schema is None else asked.json_schema.schema
        return format_part("response_format", "json_schema.schema", asked.type, schema)

    def _structured_outputs(self) -> list[NamedPart]:
        asked = self.structured_outputs
        if asked is None:
            return []
        found = _written(
            "structured_outputs.", asked.json, asked.regex, asked.choice, asked.grammar
        )
        if asked.json_object:
            found.append(_json("structured_outputs.json_object", JSON_OBJECT))
        if not found:
            known = ", ".join(asked.__struct_fields__)
            raise invalid(
                f"'structured_outputs' is empty; give it one of {known}", "structured_outputs"
            )
        return found

    def _guided(self) -> list[NamedPart]:
        return _written(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )


def format_part(
    field: str, schema_field: str, kind: str, schema: Schema | None
) -> NamedPart | None:
    """A format of OpenAI's or Anthropic's; None for text. Raises ApiError 400."""
    if kind == "text":
        return None
    if kind == "json_object":
        return _json(field, JSON_OBJECT)
    if kind != "json_schema":
        raise invalid(
            f"'{field}.type' = {kind!r} is unknown; known are {', '.join(FORMATS)}", field
        )
    if schema is None:
        raise invalid(f"'{field}.{schema_field}' is missing", field)
    return _json(field, schema)


def _written(
    prefix: str,
    schema: SchemaField | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> list[NamedPart]:
    found: list[NamedPart] = []
    if schema is not None:
        found.append(_json(f"{prefix}json", schema))
    if regex is not None:
        found.append(NamedPart(f"{prefix}regex", regex_part(regex)))
    if choice is not None:
        if not choice:
            raise invalid(
                f"'{prefix}choice' is empty; name the answers there are", f"{prefix}choice"
            )
        found.append(NamedPart(f"{prefix}choice", choice_part(choice)))
    if grammar is not None:
        if "::=" in grammar:
            raise invalid(
                f"'{prefix}grammar' looks like GBNF; write it in Lark (python -m "
                "llguidance.gbnf_to_lark converts it)",
                f"{prefix}grammar",
            )
        found.append(NamedPart(f"{prefix}grammar", lark_part(grammar)))
    return found


def _json(field: str, schema: SchemaField) -> NamedPart:
    if isinstance(schema, str):
        try:
            schema = msgspec.convert(orjson.loads(schema), Schema)
        except (orjson.JSONDecodeError, msgspec.ValidationError) as error:
            raise invalid(f"{field!r} is no JSON schema: {error}", field) from None
    return NamedPart(field, schema_part(schema))
