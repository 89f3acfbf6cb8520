"""GET /: a plain text page that says what this is and how to talk to it."""

from __future__ import annotations

from blacksheep import Content, Request, Response

from api.about import own_version
from api.respond import TEXT, json_response
from api.routes.route import Route
from api.service import Service
from api.summary import curl_example


def index_routes(service: Service) -> list[Route]:
    version = {"version": own_version()}  # found in files: not for a request to do

    async def index(request: Request) -> Response:
        host = (request.get_first_header(b"host") or b"localhost").decode("latin-1")
        has_key = bool(service.config.client_api_keys)
        names = [] if has_key else service.registry.names  # not for everybody to know
        lines = [
            "RWKV-7 inference server, OpenAI protocol",
            "",
            f"Models: {', '.join(names) or 'GET /v1/models with an API key'}",
            "",
            "Try it:",
            curl_example(f"http://{host}", names[0] if names else "MODEL", has_key),
            "",
            "POST /v1/chat/completions    POST /v1/completions",
            "POST /v1/responses           POST /v1/messages",
            "GET  /v1/models              GET  /v1/models/{id}",
            "GET  /v1/states              POST /v1/states",
            "POST /v1/embeddings          POST /tokenize      POST /detokenize",
            "GET  /docs                   GET  /openapi.json  GET  /version",
            "GET  /health                 GET  /health/live    GET /health/ready",
            "GET  /metrics                POST /admin/models/reload",
            "",
        ]
        return Response(200, content=Content(TEXT, "\n".join(lines).encode()))

    async def show_version(request: Request) -> Response:
        return json_response(version)

    return [Route("GET", "/", index), Route("GET", "/version", show_version)]
