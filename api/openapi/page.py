"""GET /docs as one HTML page: the OpenAPI document written out, without scripts or other files."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import orjson

from api.openapi.operations import EVENTS

Json = dict[str, Any]  # of the document, whose shape its own tests know

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace }
pre { overflow-x: auto; padding: .7rem; border: 1px solid #8884; border-radius: 4px }
details { border-top: 1px solid #8884; padding: .4rem 0 }
summary { cursor: pointer }
summary b { display: inline-block; min-width: 4.5rem }
td { padding: .1rem 1rem .1rem 0; vertical-align: top }
:root { color-scheme: light dark }
"""


def docs_page(document: Json) -> bytes:
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{escape(info['title'])}</title><style>{STYLE}</style>",
        f"<h1>{escape(info['title'])}</h1>",
        f"<p>Version {escape(info['version'])}. {escape(info['description'])}</p>",
        "<p>The same for programs: <code>GET /openapi.json</code>.</p>",
        "<p>Where an API key is set, send <code>Authorization: Bearer KEY</code>.</p>",
    ]
    for tag in document["tags"]:
        parts.append(f"<h2 id={tag['name']}>{escape(tag['description'])}</h2>")
        parts += _operations(document, tag["name"])
    parts.append("<h2 id=schemas>Schemas</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        shown = escape(orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode())
        parts.append(
            f"<details id={name}><summary><code>{name}</code></summary><pre>{shown}</pre></details>"
        )
    return "\n".join(parts).encode()


def _operations(document: Json, tag: str) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if operation["tags"] == [tag]:
                body = "".join(_body(operation))
                yield (
                    f"<details id={operation['operationId']}><summary><b>{method.upper()}</b> "
                    f"<code>{escape(path)}</code> {escape(operation['summary'])}</summary>"
                    f"{body}</details>"
                )


def _body(operation: Json) -> Iterator[str]:
    if "security" in operation:
        yield "<p>Needs no API key.</p>"
    if parameters := operation.get("parameters"):
        rows = (
            f"<tr><td><code>{parameter['name']}</code><td>{parameter['in']}"
            f"<td>{escape(parameter['schema'].get('description', ''))}"
            for parameter in parameters
        )
        yield f"<table>{''.join(rows)}</table>"
    if "requestBody" in operation:
        yield f"<p>Takes {_content(operation['requestBody']['content'])}</p>"
    yield f"<p>Gives {_content(operation['responses']['200']['content'])}</p>"
    errors = [status for status in operation["responses"] if status != "200"]
    yield f"<p>Otherwise {', '.join(errors)}</p>"


def _content(content: Json) -> str:
    """Content types, each with a link to its schema where it has one."""
    shown = []
    for kind, media in content.items():
        link = media["schema"]
        if kind == EVENTS:
            link = link["properties"]["data"]["anyOf"][-1]["contentSchema"]["anyOf"][0]
        elif link.get("type") == "array":
            link = link["items"]
        name = link.get("$ref", "").rpartition("/")[2]
        end = f": <a href='#{name}'>{name}</a>" if name else ""
        shown.append(f"<code>{escape(kind)}</code>{end}")
    return " or ".join(shown)
