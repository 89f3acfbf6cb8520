"""GET /health, /health/live, /health/ready and /metrics: what probes and people ask."""

from __future__ import annotations

import time
from dataclasses import asdict

from blacksheep import Content, Request, Response

from api.registry import Replica
from api.respond import json_response
from api.routes.route import Route
from api.service import Service
from engine.types import EngineSnapshot

METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


def health_routes(service: Service) -> list[Route]:
    async def health(request: Request) -> Response:
        """Everything; 503 only when a model is out of service."""
        status = _status(service)
        report = {
            "status": status,
            "server_time_unix_ms": int(1000 * time.time()),
            "models": [_model_report(replica) for replica in service.registry.replicas],
            "last_reload": service.last_reload and asdict(service.last_reload),
        }
        return json_response(report, 503 if status == "dead" else 200)

    async def live(request: Request) -> Response:
        """503 when only a restart helps: a device has failed."""
        is_dead = _status(service) == "dead"
        return json_response({"status": "dead" if is_dead else "ok"}, 503 if is_dead else 200)

    async def ready(request: Request) -> Response:
        """503 while new requests are refused."""
        status = _status(service)
        return json_response({"status": status}, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(200, content=Content(METRICS_TYPE, await service.metrics.render()))

    return [
        Route("GET", "/health", health),
        Route("GET", "/health/live", live),
        Route("GET", "/health/ready", ready),
        Route("GET", "/metrics", metrics),
    ]


def _status(service: Service) -> str:
    if service.registry.has_dead:
        return "dead"
    return "draining" if service.is_draining else "ok"


def _model_report(replica: Replica) -> dict[str, object]:
    info = replica.client.info
    snapshot: EngineSnapshot = replica.client.snapshot()
    return {
        "model_name": info.model_name,
        "fingerprint": info.fingerprint,
        "num_parameters": info.num_parameters,
        "device": info.device,
        "dtype": info.dtype,
        "state_dtype": info.state_dtype,
        "page_bytes": info.page_bytes,
        "max_batch_size": info.max_batch_size,
        "paragraph_len": info.paragraph_len,
        "accepting": snapshot.is_accepting,
        "dead": snapshot.is_dead,
        "error": snapshot.death,
        "running": snapshot.num_running,
        "waiting": snapshot.num_waiting,
        "slots": snapshot.num_slots,
        "free_slots": snapshot.num_free_slots,
        "seconds_since_commit": snapshot.seconds_since_commit,
    }
