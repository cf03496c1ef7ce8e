"""A small client of the HTTP contract."""

from __future__ import annotations

import base64
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from service.errors import RequestRefused, ServiceUnreachable
from service.schemas import (
    AliasView,
    CompletionView,
    SceneList,
    SceneView,
    VersionList,
    VersionView,
)

DEFAULT_URL = "http://127.0.0.1:3000"


class Client:
    """Calls a running service; not for several threads at once.

    Args:
        url: Where it listens.
        timeout_s: Longest silence to wait through; the service's own limit should be shorter.
        transport: Replaces the network, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def complete(
        self, scene: str, image: Path | bytes, mask: Path | bytes, **fields: object
    ) -> CompletionView:
        """Complete an image.

        Args:
            scene: Name, ``name@alias``, ``name@3`` or ``sha256:<digest>``.
            image: The image with the hole.
            mask: White where pixels are missing.
            fields: As in ``CompletionFields``; None is left out.

        Raises:
            RequestRefused: The service answered with an error.
            ServiceUnreachable: It did not answer.
        """
        answer = self._call(
            "POST",
            f"/v1/scenes/{scene}/complete",
            headers={"Accept": "application/json"},
            files={"image": ("image", _read(image)), "mask": ("mask", _read(mask))},
            data={name: str(value) for name, value in fields.items() if value is not None},
        )
        return CompletionView.model_validate_json(answer.content)

    def publish(self, scene: str, capsule: Path | bytes, *, alias: str = "live") -> VersionView:
        """Publish a capsule as the scene's next version; errors as for ``complete``."""
        answer = self._call(
            "POST",
            f"/v1/scenes/{scene}/versions",
            params={"alias": alias},
            headers={"Content-Type": "application/octet-stream"},
            content=_read(capsule),
        )
        return VersionView.model_validate_json(answer.content)

    def scenes(self) -> list[SceneView]:
        """All scenes by name, page after page."""
        found: list[SceneView] = []
        while True:
            after = found[-1].name if found else ""
            answer = self._call("GET", "/v1/scenes", params={"after": after})
            page = SceneList.model_validate_json(answer.content).scenes
            if not page:
                return found
            found += page

    def scene(self, name: str) -> SceneView:
        """One scene with its aliases."""
        return SceneView.model_validate_json(self._call("GET", f"/v1/scenes/{name}").content)

    def versions(self, scene: str) -> list[VersionView]:
        """The newest versions of a scene."""
        answer = self._call("GET", f"/v1/scenes/{scene}/versions")
        return VersionList.model_validate_json(answer.content).versions

    def set_alias(
        self, scene: str, alias: str, version: int, *, expect: int | None = None
    ) -> AliasView:
        """Point an alias to a version; with ``expect`` only from the version of that number."""
        answer = self._call(
            "PUT",
            f"/v1/scenes/{scene}/aliases/{alias}",
            json={"version": version},
            headers={} if expect is None else {"If-Match": f'"{expect}"'},
        )
        return AliasView.model_validate_json(answer.content)

    def ready(self) -> bool:
        """Whether the service takes completions; False also where nobody answers."""
        try:
            return self._http.get("/readyz", timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ServiceUnreachable(
                f"No answer from {self.url} ({error or type(error).__name__}): start it with "
                "`realfill serve`, or name another with --url."
            ) from error
        if answer.is_success:
            return answer
        try:
            fault = answer.json()["error"]
            message, refusal = str(fault["message"]), str(fault["code"])
            request_id = str(fault["request_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceUnreachable(
                f"{self.url} answered {answer.status_code} in another shape than this service's: "
                "check the address and the proxies on the way."
            ) from error
        raise RequestRefused(
            message, status=answer.status_code, refusal=refusal, request_id=request_id
        )


def image_of(encoded: str | None) -> bytes:
    """The image file in a candidate's ``image``, which must be among the first ``top``."""
    if encoded is None:
        raise ValueError("this candidate carries no image; ask for a larger top")
    return base64.b64decode(encoded)


def _read(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()
