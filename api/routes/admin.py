"""POST /admin/models/reload: change the infer TOML and the running models together."""

from __future__ import annotations

import asyncio

from blacksheep import Request, Response

from api.errors import ApiError, draining, from_engine, invalid
from api.reload import TO_BUILD, Patch, Reloader, describe
from api.respond import json_response, read_json
from api.routes.route import Route
from api.schemas import parse_reload
from api.service import Service
from config import Change, ConfigError, ReloadPlan
from engine.errors import EngineError


def admin_routes(service: Service, reloader: Reloader) -> list[Route]:
    async def reload_models(request: Request) -> Response:
        body = parse_reload(await read_json(request))
        if service.is_draining:
            raise draining()
        change = Patch(body.upsert, body.remove_model_names)
        work = asyncio.create_task(_patch(reloader, change, body.dry_run))
        # A client that goes away must not leave a reload half done.
        plan = await asyncio.shield(work)
        return json_response(_report(plan, body.dry_run))

    return [Route("POST", "/admin/models/reload", reload_models, needs_admin=True)]


async def _patch(reloader: Reloader, change: Patch, is_dry_run: bool) -> ReloadPlan:
    try:
        return await reloader.patch_file(change, is_dry_run=is_dry_run)
    except ApiError:
        raise
    except ConfigError as error:
        raise invalid(str(error), error.key or None, "invalid_config") from None
    except EngineError as error:
        refusal = from_engine(error)
        raise ApiError(400, refusal.message, code="model_not_loaded") from None
    except Exception as error:
        message = f"nothing was changed: {type(error).__name__}: {error}"
        raise ApiError(500, message, code="reload_failed") from error


def _report(plan: ReloadPlan, is_dry_run: bool) -> dict[str, object]:
    """The fields of rwkv-rs; what is changed but not rebuilt took effect on the running model."""
    changed = [
        change.model_name for change in plan.models if change.change in (*TO_BUILD, Change.LIVE)
    ]
    rebuilt = [change.model_name for change in plan.models if change.change in TO_BUILD]
    removed = plan.names(Change.REMOVED)
    active = {change.model_name for change in plan.models} - set(removed)
    verb = "would be done (dry run)" if is_dry_run else "done"
    return {
        "changed_model_names": sorted(changed),
        "rebuilt_model_names": sorted(rebuilt),
        "removed_model_names": sorted(removed),
        "active_model_names": sorted(active),
        "dry_run": is_dry_run,
        "message": f"{verb}: {describe(plan)}",
    }
