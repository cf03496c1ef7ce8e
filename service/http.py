"""The public HTTP contract: a FastAPI app over a road. Only ``errors.py`` knows statuses."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from realfill.errors import RealFillError
from registry.errors import RegistryError
from service.catalogue import Catalogue, add_routes, binary
from service.completions import WORKERS, Completions, most_in_flight
from service.errors import (
    EngineClosed,
    InvalidQuery,
    QueueFull,
    ServiceError,
    UnsupportedMedia,
)
from service.forms import media_type, refusal
from service.metrics import Metrics
from service.middleware import (
    LimitBody,
    RecordRequests,
    error_response,
    fault_response,
    record_of,
)
from service.road import Road
from service.schemas import CompletionFields, CompletionView, ErrorView
from service.settings import Settings


class Probes:
    """Whether the process lives, whether it takes completions, and its metrics."""

    def __init__(self, road: Road, metrics: Metrics) -> None:
        self.road = road
        self.metrics = metrics

    async def livez(self) -> dict[str, str]:
        """Whether the process answers at all, and would not be better off started anew."""
        if not self.road.alive:
            raise EngineClosed("The lane has ended, its log says why: restart the service.")
        return {"status": "alive"}

    async def readyz(self) -> dict[str, str]:
        """Whether completions are taken."""
        if not self.road.ready:
            raise EngineClosed("The service is starting or stopping: try again in a moment.")
        return {"status": "ready"}

    async def exposition(self) -> Response:
        """Metrics, for Prometheus."""
        return Response(self.metrics.exposition(), media_type=self.metrics.content_type)


def _completion_body() -> dict[str, Any]:
    """The multipart body for OpenAPI: the handler reads it itself, in order to be strict."""
    schema = CompletionFields.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"] = {"image": file, "mask": file, **schema["properties"]}
    schema["required"] = ["image", "mask"]
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def _router(probes: Probes, catalogue: Catalogue, completions: Completions) -> APIRouter:
    # Declared for all routes, so that FastAPI does not promise its own shape for 422.
    router = APIRouter(responses={"4XX": {"model": ErrorView}, "5XX": {"model": ErrorView}})
    images = binary("image/png", "image/jpeg", "image/webp")
    router.add_api_route(
        "/v1/scenes/{scene}/complete",
        completions.complete,
        methods=["POST"],
        responses={200: {"model": CompletionView, **images}},
        response_class=JSONResponse,
        openapi_extra=_completion_body(),
    )
    add_routes(router, catalogue)
    for path, probe in (("/livez", probes.livez), ("/readyz", probes.readyz)):
        router.add_api_route(path, probe, methods=["GET"])
        # Some balancers ask so.
        router.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
    router.add_api_route("/metrics", probes.exposition, methods=["GET"], include_in_schema=False)
    return router


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    record = record_of(request.scope)
    record.fields["error"] = getattr(error, "code", type(error).__name__)
    return error_response(error, record.request_id, headers)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = list(error.errors())
    fault, place = refusal(faults), faults[0]["loc"]
    if place[0] == "query":
        fault = InvalidQuery(str(fault))
    kind = media_type(request)
    if place == ("body",) and not kind.endswith("json"):
        fault = UnsupportedMedia(
            f"The body is {kind or 'of no declared type'}: send JSON, and say so with "
            "-H 'Content-Type: application/json'."
        )
    return await _on_error(request, fault)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    known = {
        404: ("route_not_found", f"There is no route {path}: see /openapi.json for the routes."),
        405: ("method_not_allowed", f"{request.method} is not for {path}: see the header Allow."),
    }
    code, message = known.get(error.status_code, ("invalid_request", str(error.detail)))
    request_id = record_of(request.scope).request_id
    headers = dict(error.headers) if error.headers else None
    return fault_response(error.status_code, code, message, request_id, headers)


def create_app(road: Road, settings: Settings) -> FastAPI:
    """Build the app.

    Args:
        road: Started by the app's lifespan or by the caller, whichever runs.
        settings: Limits and defaults.
    """
    metrics = Metrics()
    work = ThreadPoolExecutor(WORKERS, thread_name_prefix="realfill-work")
    waiting = ThreadPoolExecutor(most_in_flight(settings), thread_name_prefix="realfill-wait")
    metrics.watch("realfill_lane_jobs", "Jobs that wait or run.", lambda: road.engine.pending)
    metrics.watch_total(
        "realfill_registry_stale", "Requests served while it was away.", lambda: road.resolver.stale
    )
    metrics.watch_engine(road.engine.metrics, road.tiers)
    completions = Completions(road, settings, metrics, work, waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        road.start()
        try:
            yield
        finally:
            road.close()
            for pool in (work, waiting):
                pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Realfill Serve",
        summary="Completes photographs of scenes it has learned, and says why it believes them.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(_router(Probes(road, metrics), Catalogue(road, waiting), completions))
    for kind in (RealFillError, RegistryError, ServiceError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    # The last one added is the outermost.
    app.add_middleware(LimitBody, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(RecordRequests, metrics=metrics)
    return app
