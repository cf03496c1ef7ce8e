"""The registry over HTTP: scenes, versions and aliases, looked at, published and moved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from starlette.requests import ClientDisconnect, Request

from registry.errors import Conflict, InvalidReference
from registry.records import Page, Version, check_alias
from service.errors import Cancelled, InvalidQuery, UnsupportedMedia
from service.forms import expected_version, media_type, no_query
from service.middleware import record_of
from service.road import Road
from service.schemas import (
    AliasFields,
    AliasTarget,
    AliasView,
    HistoryFields,
    MoveList,
    MoveView,
    SceneFields,
    SceneList,
    SceneView,
    SearchFields,
    VersionFields,
    VersionList,
    VersionPage,
    VersionView,
)

T = TypeVar("T")

# Of every route without fields of a query string: a misspelt one must not pass for an absent one.
NO_QUERY = [Depends(no_query)]


class Catalogue:
    """The handlers; ``pool`` holds their work, which waits for the registry."""

    def __init__(self, road: Road, pool: ThreadPoolExecutor) -> None:
        self.road = road
        self.pool = pool

    async def scenes(self, fields: Annotated[SceneFields, Query()]) -> SceneList:
        """Scenes by name, from the one that follows ``after``."""
        registry = self.road.registry
        found = await self._in_thread(
            lambda: registry.scenes(after=fields.after, limit=fields.limit)
        )
        return SceneList(scenes=[SceneView.of(scene) for scene in found])

    async def scene(self, scene: str) -> SceneView:
        """One scene with its aliases."""
        return SceneView.of(await self._in_thread(lambda: self.road.registry.scene(scene)))

    async def versions(self, scene: str, fields: Annotated[VersionFields, Query()]) -> VersionList:
        """Versions of a scene, newest first, from the one below ``before``."""
        registry = self.road.registry
        found = await self._in_thread(
            lambda: registry.versions(scene, before=fields.before, limit=fields.limit)
        )
        return VersionList(versions=[VersionView.of(version) for version in found])

    async def search(self, fields: Annotated[SearchFields, Query()]) -> VersionPage:
        """Versions of all scenes that meet every condition, newest first, a page at a time."""

        def look() -> Page:
            with _query_string():
                after, limit = fields.after, fields.limit
                return self.road.registry.search(fields.query(), after=after, limit=limit)

        return VersionPage.of(await self._in_thread(look))

    async def history(self, scene: str, fields: Annotated[HistoryFields, Query()]) -> MoveList:
        """Every move of a scene's aliases, or of one of them, oldest first."""
        if fields.alias is not None:
            with _query_string():
                check_alias(fields.alias)
        registry = self.road.registry
        moves = await self._in_thread(lambda: registry.history(scene, fields.alias))
        return MoveList(moves=[MoveView.of(move) for move in moves])

    async def publish(
        self, scene: str, request: Request, fields: Annotated[AliasFields, Query()]
    ) -> Response:
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
            registry = self.road.registry
            version = registry.publish(capsule, scene=scene, alias=fields.alias, by="http")
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

    async def rollback(
        self, scene: str, request: Request, fields: Annotated[AliasFields, Query()]
    ) -> Response:
        """Point an alias back to the version it left; with If-Match only from the one named."""
        expect = expected_version(request.headers.get("if-match"))
        registry = self.road.registry
        version = await self._in_thread(
            lambda: registry.rollback(scene, fields.alias, expect=expect, by="http")
        )
        return _alias_response(version, fields.alias)

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

    async def restore(self, scene: str, number: int) -> VersionView:
        """Show a retired version again; 409 where a sweep removed its bytes."""
        registry = self.road.registry
        restored = await self._in_thread(lambda: registry.restore(scene, number, by="http"))
        return VersionView.of(restored)

    async def _resolve(self, scene: str, number: int) -> Version:
        return await self._in_thread(lambda: self.road.registry.resolve(f"{scene}@{number}"))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)


def add_routes(router: APIRouter, catalogue: Catalogue) -> None:
    """Add the catalogue's routes to a router."""
    router.add_api_route("/v1/scenes", catalogue.scenes, methods=["GET"])
    router.add_api_route(
        "/v1/scenes/{scene}", catalogue.scene, methods=["GET"], dependencies=NO_QUERY
    )
    router.add_api_route("/v1/scenes/{scene}/versions", catalogue.versions, methods=["GET"])
    router.add_api_route(
        "/v1/scenes/{scene}/versions",
        catalogue.publish,
        methods=["POST"],
        status_code=201,
        responses={201: {"model": VersionView}},
        openapi_extra={"requestBody": {"required": True, **binary("application/octet-stream")}},
    )
    router.add_api_route("/v1/scenes/{scene}/history", catalogue.history, methods=["GET"])
    router.add_api_route("/v1/versions", catalogue.search, methods=["GET"])
    router.add_api_route(
        "/v1/scenes/{scene}/aliases/{alias}",
        catalogue.set_alias,
        methods=["PUT"],
        dependencies=NO_QUERY,
        responses={200: {"model": AliasView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/aliases/{alias}",
        catalogue.alias,
        methods=["GET"],
        dependencies=NO_QUERY,
        responses={200: {"model": AliasView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/rollback",
        catalogue.rollback,
        methods=["POST"],
        responses={200: {"model": AliasView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/versions/{number}",
        catalogue.version,
        methods=["GET"],
        dependencies=NO_QUERY,
        responses={200: {"model": VersionView}},
    )
    router.add_api_route(
        "/v1/scenes/{scene}/versions/{number}",
        catalogue.retire,
        methods=["DELETE"],
        dependencies=NO_QUERY,
    )
    router.add_api_route(
        "/v1/scenes/{scene}/versions/{number}/restore",
        catalogue.restore,
        methods=["POST"],
        dependencies=NO_QUERY,
    )
    router.add_api_route(
        "/v1/scenes/{scene}/versions/{number}/file",
        catalogue.file,
        methods=["GET"],
        dependencies=NO_QUERY,
        responses={200: binary("application/octet-stream")},
    )


def binary(*types: str) -> dict[str, Any]:
    """A body of bytes of these media types, for OpenAPI."""
    file = {"schema": {"type": "string", "format": "binary"}}
    return {"content": dict.fromkeys(types, file)}


@contextmanager
def _query_string() -> Iterator[None]:
    """What the registry refuses of a query string's parameters is the query string's fault."""
    try:
        yield
    except InvalidReference as error:
        raise InvalidQuery(str(error)) from error


def _alias_response(version: Version, alias: str) -> Response:
    view = AliasView(scene=version.scene, alias=alias, version=version.number)
    headers = {"ETag": f'"{version.number}"'}
    return Response(view.model_dump_json(), media_type="application/json", headers=headers)
