"""POST /tokenize, POST /detokenize, GET /tokenizer_info, also under /v1: text and token ids.

The shapes are vLLM's, which lm-eval's remote tokenizer reads.
"""

from __future__ import annotations

import asyncio

from blacksheep import Request, Response

from api.chat import render
from api.chat_jinja import JINJA
from api.errors import invalid
from api.prompt import BEGIN_OF_DOCUMENT, Prompt, encode
from api.registry import Replica
from api.respond import json_response, read_json
from api.routes.route import Route
from api.routes.states import ModelFields, query_of, replica_of
from api.service import Service
from api.token_bodies import TokenizeBody, parse_detokenize, parse_tokenize
from engine.tokenizer import Tokenizer

# A name for token 0, which has no text: that of the published Hugging Face tokenizers. It is
# understood at the beginning of a prompt of /tokenize, where clients look up its id and begin a
# document with it, and nowhere else.
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
SLICE_TOKENS = 4096
PREFIXES = ("", "/v1")


def tokenizer_routes(service: Service) -> list[Route]:
    async def tokenize(request: Request) -> Response:
        body = parse_tokenize(await read_json(request))
        replica = replica_of(service, body.model)
        ids = await _ids(replica, body)
        answer: dict[str, object] = {
            "count": len(ids),
            "max_model_len": replica.table.max_context_len or None,
            "tokens": ids,
        }
        if body.return_token_strs:
            decode = replica.client.tokenizer.decode
            answer["token_strs"] = [decode((token_id,)) for token_id in ids]
        return json_response(answer)

    async def detokenize(request: Request) -> Response:
        body = parse_detokenize(await read_json(request))
        replica = replica_of(service, body.model)
        return json_response({"prompt": await decode_all(replica.client.tokenizer, body.tokens)})

    async def tokenizer_info(request: Request) -> Response:
        replica = replica_of(service, query_of(request, ModelFields).model)
        tokenizer = replica.client.tokenizer
        return json_response(
            {
                "model": replica.table.model_name,
                "tokenizer_class": "RWKV World",
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": replica.table.max_context_len or None,
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
                "chat_template": JINJA[replica.table.template],
            }
        )

    return [
        route
        for prefix in PREFIXES
        for route in (
            Route("POST", f"{prefix}/tokenize", tokenize),
            Route("POST", f"{prefix}/detokenize", detokenize),
            Route("GET", f"{prefix}/tokenizer_info", tokenizer_info),
        )
    ]


async def decode_all(tokenizer: Tokenizer, ids: list[int] | None) -> str:
    """The text of any number of tokens. Raises ApiError 400 for an unknown one."""
    parts = []
    for index, token_id in enumerate(ids or ()):
        if index % SLICE_TOKENS == 0:
            await asyncio.sleep(0)
        try:
            parts.append(tokenizer.token_bytes(token_id))
        except ValueError as error:
            raise invalid(f"'tokens[{index}]': {error}", f"tokens[{index}]") from None
    return b"".join(parts).decode("utf-8", "replace")


async def _ids(replica: Replica, body: TokenizeBody) -> list[int]:
    """What the routes for completions and chats would feed."""
    named: list[int] = []
    messages = body.chat
    if messages is None:
        text = body.prompt or ""
        if text.startswith(END_OF_TEXT):
            named, text = [BEGIN_OF_DOCUMENT], text.removeprefix(END_OF_TEXT)
        prompt = Prompt("prompt", text, is_continuation=not body.begins_document)
    else:
        asks_answer = body.add_generation_prompt is not False
        rendered = render(messages, replica.table.template, asks_answer=asks_answer)
        prompt = Prompt("messages", rendered.text, is_continuation=not body.begins_document)
    return named + list((await encode(prompt, replica.client.tokenizer)).ids)
