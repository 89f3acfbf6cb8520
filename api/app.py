"""The BlackSheep application: routes, and errors in the words of the protocol that was spoken."""

from __future__ import annotations

from collections.abc import Sequence

from blacksheep import Application, Request, Response, Router
from blacksheep.exceptions import HTTPException

from api.dialect import error_body
from api.errors import ApiError
from api.lifetime import LifetimeGuard, lifetime_of
from api.reload import Reloader
from api.respond import error_response
from api.routes.abort import abort_routes
from api.routes.admin import admin_routes
from api.routes.chat import chat_routes
from api.routes.completions import completion_routes
from api.routes.docs import docs_routes
from api.routes.embeddings import embedding_routes
from api.routes.health import health_routes
from api.routes.index import index_routes
from api.routes.messages import message_routes
from api.routes.models import model_routes
from api.routes.render import render_routes
from api.routes.responses import response_routes
from api.routes.route import Handler, Route
from api.routes.scores import score_routes
from api.routes.state_creation import state_creation_routes
from api.routes.states import state_routes
from api.routes.tokenizer import tokenizer_routes
from api.service import Service

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class QuietApplication(Application):
    """Errors that clients are told about are not news for the log."""

    async def log_handled_exc(self, request: Request, exc: Exception) -> None:
        return


async def create_app(service: Service, reloader: Reloader) -> LifetimeGuard:
    """The ASGI application, started. Lifespan messages are not needed."""
    app = _application(all_routes(service, reloader))
    await app.start()  # type: ignore[no-untyped-call]
    return LifetimeGuard(app, lambda: service.config)


def all_routes(service: Service, reloader: Reloader) -> list[Route]:
    return [
        *index_routes(service),
        *chat_routes(service),
        *completion_routes(service),
        *response_routes(service),
        *message_routes(service),
        *state_creation_routes(service),
        *state_routes(service),
        *model_routes(service),
        *admin_routes(service, reloader),
        *health_routes(service),
        *tokenizer_routes(service),
        *render_routes(service),
        *embedding_routes(service),
        *score_routes(service),
        *abort_routes(service),
        *docs_routes(),
    ]


def _application(routes: Sequence[Route]) -> Application:
    app = QuietApplication(router=Router())
    for route in routes:
        handler = _for_admins(route.handler) if route.needs_admin else route.handler
        app.router.add(route.method, route.path, handler)
        if route.method == "GET":
            app.router.add("HEAD", route.path, handler)

    async def fallback(request: Request) -> Response:
        raise _no_such_route(app, request)

    async def on_api_error(_: Application, request: Request, error: ApiError) -> Response:
        return _refusal(request, error)

    async def on_http_error(_: Application, request: Request, error: HTTPException) -> Response:
        return _refusal(request, ApiError(error.status, str(error) or "not a valid request"))

    async def on_crash(_: Application, request: Request, error: Exception) -> Response:
        message = "internal error; the server's log says more"
        return _refusal(request, ApiError(500, message, code="internal_error"))

    app.router.fallback = fallback
    app.exceptions_handlers[ApiError] = on_api_error
    app.exceptions_handlers[HTTPException] = on_http_error
    app.exceptions_handlers[500] = on_crash
    return app


def _for_admins(handler: Handler) -> Handler:
    async def checked(request: Request) -> Response:
        lifetime_of(request).caller.check_admin()
        return await handler(request)

    return checked


def _refusal(request: Request, error: ApiError) -> Response:
    path = request.url.path.decode("latin-1")
    return error_response(error, error_body(path, error, lifetime_of(request).request_id))


def _no_such_route(app: Application, request: Request) -> ApiError:
    """404 for an unknown path, 405 where the path is known under another method."""
    path = request.url.path
    allowed = [
        method for method in METHODS if app.router.get_matching_route(method, path) is not None
    ]
    shown = path.decode("latin-1")
    if not allowed:
        return ApiError(404, f"there is nothing at {shown}", code="unknown_url")
    allow = ", ".join([*allowed, "OPTIONS"])
    return ApiError(
        405,
        f"{request.method} is not possible at {shown}; use {allow}",
        code="method_not_allowed",
        headers=((b"allow", allow.encode()),),
    )
