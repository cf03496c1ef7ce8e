"""The public HTTP contract: a FastAPI app over a road. Only ``errors.py`` knows statuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from realfill.errors import RealFillError
from registry.errors import Conflict, RegistryError
from registry.records import Version
from service.completions import WORKERS, Completions
from service.errors import (
    Cancelled,
    EngineClosed,
    InvalidRequest,
    QueueFull,
    ServiceError,
    UnsupportedMedia,
)
from service.forms import expected_version, media_type, refusal
from service.metrics import Metrics
from service.middleware import (
    LimitBody,
    RecordRequests,
    error_response,
    fault_response,
    record_of,
)
from service.road import Road
from service.schemas import (
    AliasTarget,
    AliasView,
    CompletionFields,
    CompletionView,
    ErrorView,
    SceneList,
    SceneView,
    VersionList,
    VersionView,
)
from service.settings import Settings

T = TypeVar("T")


class Routes:
    """The handlers beside completions: the catalogue, publishing, probes and metrics."""

    def __init__(self, road: Road, metrics: Metrics, pool: ThreadPoolExecutor) -> None:
        self.road = road
        self.metrics = metrics
        self.pool = pool

    async def scenes(self, after: str = "", limit: int = 100) -> SceneList:
        """Scenes by name, from the one that follows ``after``."""
        limit = _page(limit)
        found = await self._in_thread(lambda: self.road.registry.scenes(after=after, limit=limit))
        return SceneList(scenes=[SceneView.of(scene) for scene in found])

    async def scene(self, scene: str) -> SceneView:
        """One scene with its aliases."""
        return SceneView.of(await self._in_thread(lambda: self.road.registry.scene(scene)))

    async def versions(
        self, scene: str, before: int | None = None, limit: int = 100
    ) -> VersionList:
        """Versions of a scene, newest first, from the one below ``before``."""
        limit = _page(limit)
        found = await self._in_thread(
            lambda: self.road.registry.versions(scene, before=before, limit=limit)
        )
        return VersionList(versions=[VersionView.of(version) for version in found])

    async def publish(self, scene: str, request: Request, alias: str = "live") -> Response:
        """Publish a capsule, checked against the base, as the scene's next version."""
        kind = media_type(request)
        if kind not in ("application/octet-stream", "application/x-safetensors"):
            raise UnsupportedMedia(
                f"The body is {kind or 'of no declared type'}: send the capsule itself as "
                "application/octet-stream, as `curl --data-binary @capsule.safetensors` can."
            )
        try:
            capsule = await request.body()
        except ClientDisconnect as error:
            raise Cancelled("The client left while it was sending.") from error

        def store() -> VersionView:
            self.road.check(capsule)
            version = self.road.registry.publish(capsule, scene=scene, alias=alias, by="http")
            return VersionView.of(version)

        view = await self._in_thread(store)
        record_of(request.scope).fields.update(scene=view.scene, version=view.version)
        location = f"/v1/scenes/{view.scene}/versions/{view.version}"
        return Response(
            view.model_dump_json(),
            status_code=201,
            media_type="application/json",
            headers={"Location": location},
        )

    async def set_alias(
        self, scene: str, alias: str, target: AliasTarget, request: Request
    ) -> Response:
        """Point an alias to a version; with If-Match only from the version named there."""
        expect = expected_version(request.headers.get("if-match"))
        registry = self.road.registry
        version = await self._in_thread(
            lambda: registry.set_alias(scene, alias, target.version, expect=expect, by="http")
        )
        return _alias_response(version, alias)

    async def alias(self, scene: str, alias: str) -> Response:
        """The version that an alias points to; its ETag is for a later If-Match."""
        version = await self._in_thread(lambda: self.road.registry.resolve(f"{scene}@{alias}"))
        return _alias_response(version, alias)

    async def rollback(self, scene: str, request: Request, alias: str = "live") -> Response:
        """Point an alias back to the version it left; with If-Match only from the one named."""
        expect = expected_version(request.headers.get("if-match"))
        registry = self.road.registry
        version = await self._in_thread(
            lambda: registry.rollback(scene, alias, expect=expect, by="http")
        )
        return _alias_response(version, alias)

    async def version(self, scene: str, number: int) -> Response:
        """One version; its ETag is the digest of its bytes."""
        version = await self._resolve(scene, number)
        body = VersionView.of(version).model_dump_json()
        return Response(body, media_type="application/json", headers={"ETag": version.etag})

    async def file(self, scene: str, number: int, request: Request) -> Response:
        """A version's capsule; 304 where If-None-Match names its digest."""
        version = await self._resolve(scene, number)
        headers = {"ETag": version.etag, "Cache-Control": "private, immutable, max-age=31536000"}
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if version.etag in known:
            return Response(status_code=304, headers=headers)
        reference = f"sha256:{version.digest}"
        data = await self._in_thread(lambda: self.road.registry.fetch(reference))
        name = f"{version.scene}-{version.number}.safetensors"
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def retire(self, scene: str, number: int) -> VersionView:
        """Hide a version; 409 while an alias points to it or another service holds it."""
        registry = self.road.registry

        def withdraw() -> Version:
            try:
                return registry.retire(scene, number, by="http")
            except Conflict:
                # This service lets it go where nothing else is in the way.
                version = registry.resolve(f"{scene}@{number}")
                if version.aliases or not self.road.let_go(version.digest):
                    raise
                return registry.retire(scene, number, by="http")

        return VersionView.of(await self._in_thread(withdraw))

    async def _resolve(self, scene: str, number: int) -> Version:
        return await self._in_thread(lambda: self.road.registry.resolve(f"{scene}@{number}"))

    async def livez(self) -> dict[str, str]:
        """Whether the process answers at all."""
        return {"status": "alive"}

    async def readyz(self) -> dict[str, str]:
        """Whether completions are taken."""
        if not self.road.ready:
            raise EngineClosed("The service is starting or stopping: try again in a moment.")
        return {"status": "ready"}

    async def exposition(self) -> Response:
        """Metrics, for Prometheus."""
        return Response(self.metrics.exposition(), media_type=self.metrics.content_type)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)


def _alias_response(version: Version, alias: str) -> Response:
    view = AliasView(scene=version.scene, alias=alias, version=version.number)
    headers = {"ETag": f'"{version.number}"'}
    return Response(view.model_dump_json(), media_type="application/json", headers=headers)


def _page(limit: int) -> int:
    if not 1 <= limit <= 1000:
        raise InvalidRequest(f"The parameter 'limit' is {limit}: ask for 1 to 1000 rows a page.")
    return limit


def _completion_body() -> dict[str, Any]:
    """The multipart body for OpenAPI: the handler reads it itself, in order to be strict."""
    schema = CompletionFields.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"] = {"image": file, "mask": file, **schema["properties"]}
    schema["required"] = ["image", "mask"]
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def _binary(*types: str) -> dict[str, Any]:
    file = {"schema": {"type": "string", "format": "binary"}}
    return {"content": dict.fromkeys(types, file)}


def _router(routes: Routes, completions: Completions) -> APIRouter:
    # Declared for all routes, so that FastAPI does not promise its own shape for 422.
    router = APIRouter(responses={"4XX": {"model": ErrorView}, "5XX": {"model": ErrorView}})
    images = _binary("image/png", "image/jpeg", "image/webp")
    router.add_api_route(
        "/v1/scenes/{scene}/complete",
        completions.complete,
        methods=["POST"],
        responses={200: {"model": CompletionView, **images}},
        response_class=JSONResponse,
        openapi_extra=_completion_body(),
    )
    router.add_api_route("/v1/scenes", routes.scenes, methods=["GET"])
    router.add_api_route("/v1/scenes/{scene}", routes.scene, methods=["GET"])
    router.add_api_route("/v1/scenes/{scene}/versions", routes.versions, methods=["GET"])
    router.add_api_route(
        "/v1/scenes/{scene}/versions",
        routes.publish,
        methods=["POST"],
        status_code=201,
        responses={201: {"model": VersionView}},
        openapi_extra={"requestBody": {"required": True, **_binary("application/octet-stream")}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/aliases/{alias}",
        routes.set_alias,
        methods=["PUT"],
        responses={200: {"model": AliasView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/aliases/{alias}",
        routes.alias,
        methods=["GET"],
        responses={200: {"model": AliasView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/rollback",
        routes.rollback,
        methods=["POST"],
        responses={200: {"model": AliasView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/versions/{number}",
        routes.version,
        methods=["GET"],
        responses={200: {"model": VersionView}},
    )
    router.add_api_route("/v1/scenes/{scene}/versions/{number}", routes.retire, methods=["DELETE"])
    router.add_api_route(
        "/v1/scenes/{scene}/versions/{number}/file",
        routes.file,
        methods=["GET"],
        responses={200: _binary("application/octet-stream")},
    )
    router.add_api_route("/livez", routes.livez, methods=["GET"])
    router.add_api_route("/readyz", routes.readyz, methods=["GET"])
    router.add_api_route("/metrics", routes.exposition, methods=["GET"], include_in_schema=False)
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
    return await _on_error(request, refusal(list(error.errors())))


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
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="realfill-work")
    routes = Routes(road, metrics, pool)
    metrics.watch("realfill_lane_jobs", "Jobs that wait or run.", lambda: road.engine.pending)
    completions = Completions(road, settings, metrics, pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        road.start()
        try:
            yield
        finally:
            road.close()
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Realfill Serve",
        summary="Completes photographs of scenes it has learned, and says why it believes them.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(_router(routes, completions))
    for kind in (RealFillError, RegistryError, ServiceError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    # The last one added is the outermost.
    app.add_middleware(LimitBody, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(RecordRequests, metrics=metrics)
    return app
