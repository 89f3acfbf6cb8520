"""Bodies whose values lie deep inside one another: answered or refused, never a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.errors import ApiError
from api.json_depth import MAX_JSON_DEPTH
from api.schemas import json_object
from tests.api.harness import running

MESSAGES = '"messages":[{"role":"user","content":"hi"}]'
USED = '"messages":[{"role":"assistant","content":[{"type":"tool_use","name":"f","input":%s}]}, %s]'
FLAT = '"input":"hi","max_output_tokens":3'


def nested(num_levels: int) -> str:
    return '{"a":' * num_levels + "1" + "}" * num_levels


@pytest.mark.parametrize("text", ['{"a":%s}', '{"b":[],"c":["[[",{"a":%s}]}'])
def test_so_many_levels_and_no_more(text: str):
    num_around = text.count("{") + text.count('"c"')
    json_object((text % nested(MAX_JSON_DEPTH - num_around)).encode())
    with pytest.raises(ApiError) as caught:
        json_object((text % nested(MAX_JSON_DEPTH - num_around + 1)).encode())
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_many_that_lie_beside_each_other_pass():
    assert len(json_object(b'{"a":[' + b"[[]]," * 10_000 + b"[]]}")["a"]) == 10_001  # type: ignore[arg-type]


@pytest.mark.parametrize("num_levels", [150, 190, 300, 1000])
async def test_every_route_answers_or_refuses(tmp_path: Path, num_levels: int):
    deep = nested(num_levels)
    schema = f'{{"type":"object","x":{deep}}}'
    tools = f'"tools":[{{"type":"function","name":"f","parameters":{schema}}}]'
    bodies = [
        ("messages", USED % (deep, '{"role":"user","content":"x"}')),
        ("messages", f'{MESSAGES},"tools":[{{"name":"f","input_schema":{schema}}}]'),
        ("messages", f'{MESSAGES},"container":{deep}'),
        ("responses", f"{FLAT},{tools}"),
        ("responses", f'{FLAT},"tool_choice":"none",{tools}'),
        ("responses", f'{FLAT},"text":{{"format":{{"type":"text","schema":{schema}}}}}'),
        (
            "chat/completions",
            f'{MESSAGES},"tools":[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}]',
        ),
    ]
    async with running(tmp_path) as server:
        for route, fields in bodies:
            limit = "" if route == "responses" else '"max_tokens":3,'
            body = f'{{"model":"m",{limit}{fields}}}'.encode()
            reply = await server.post(f"/v1/{route}", body)
            assert reply.status in (200, 400), (route, fields[:80], reply)
