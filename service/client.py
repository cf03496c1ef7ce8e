"""A small client of the HTTP contract."""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import pybase64
from pydantic import BaseModel, ValidationError

from registry.search import Query
from service.errors import RequestRefused, ServiceUnreachable
from service.schemas import (
    AliasView,
    CompletionView,
    MoveList,
    MoveView,
    SceneList,
    SceneView,
    SearchFields,
    VersionList,
    VersionPage,
    VersionView,
)

DEFAULT_URL = "http://127.0.0.1:3000"
DEFAULT_TIMEOUT_S = 120

View = TypeVar("View", bound=BaseModel)


class Client:
    """Calls a running service; not for several threads at once.

    Args:
        url: Where it listens.
        timeout_s: Longest silence to wait through; the service's own limit should be shorter.
        transport: Replaces the network, for tests.

    Raises:
        ServiceUnreachable: The address is none, or a proxy in the environment cannot be used.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        try:
            if transport is None and _is_here(httpx.URL(self.url).host):
                # Otherwise the environment's proxies would be asked, which cannot reach it.
                transport = httpx.HTTPTransport()
            self._http = httpx.Client(base_url=self.url, timeout=timeout_s, transport=transport)
        # A proxy of another kind is a ValueError, and one whose package is missing an ImportError.
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            raise ServiceUnreachable(
                f"{url} cannot be asked ({error}): check the address and the proxies in the "
                "environment."
            ) from error

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
        return self._ask(
            CompletionView,
            "POST",
            f"{_scene(scene)}/complete",
            headers={"Accept": "application/json"},
            files={"image": ("image", _read(image)), "mask": ("mask", _read(mask))},
            data={name: str(value) for name, value in fields.items() if value is not None},
        )

    def publish(self, scene: str, capsule: Path | bytes, *, alias: str = "live") -> VersionView:
        """Publish a capsule as the scene's next version; errors as for ``complete``."""
        return self._ask(
            VersionView,
            "POST",
            f"{_scene(scene)}/versions",
            params={"alias": alias},
            headers={"Content-Type": "application/octet-stream"},
            content=_read(capsule),
        )

    def scenes(self) -> list[SceneView]:
        """All scenes by name, page after page."""
        found: list[SceneView] = []
        while True:
            after = found[-1].name if found else ""
            page = self._ask(SceneList, "GET", "/v1/scenes", params={"after": after}).scenes
            if not page:
                return found
            found += page

    def scene(self, name: str) -> SceneView:
        """One scene with its aliases."""
        return self._ask(SceneView, "GET", _scene(name))

    def versions(self, scene: str) -> list[VersionView]:
        """The newest versions of a scene."""
        return self._ask(VersionList, "GET", f"{_scene(scene)}/versions").versions

    def version(self, scene: str, number: int) -> VersionView:
        """One version of a scene."""
        return self._ask(VersionView, "GET", f"{_scene(scene)}/versions/{number}")

    def search(
        self, query: Query | None = None, *, after: str | None = None, limit: int = 100
    ) -> VersionPage:
        """Versions of all scenes that meet every condition of the query, newest first.

        Args:
            after: What the page before gave as its ``after``.
            limit: Versions of one page, 1 to 1000.
        """
        fields = SearchFields.of(query or Query(), after, limit)
        parameters = fields.model_dump(mode="json", exclude_defaults=True)
        return self._ask(VersionPage, "GET", "/v1/versions", params=parameters)

    def download(self, scene: str, number: int) -> bytes:
        """A version's capsule, its bytes checked against the digest that the service states.

        Raises:
            RequestRefused: The service answered with an error.
            ServiceUnreachable: It did not answer, or other bytes arrived than it sent.
        """
        answer = self._call("GET", f"{_scene(scene)}/versions/{number}/file")
        stated = answer.headers.get("ETag", "").removeprefix("W/")
        digest = hashlib.sha256(answer.content).hexdigest()
        if stated != f'"sha256:{digest}"':
            raise ServiceUnreachable(
                f"The capsule {scene}@{number} arrived with the digest sha256:{digest}, and "
                f"{self.url} stated {stated or 'none'}: check the proxies on the way, then "
                "download it again."
            )
        return answer.content

    def retire(self, scene: str, number: int) -> VersionView:
        """Hide a version."""
        return self._ask(VersionView, "DELETE", f"{_scene(scene)}/versions/{number}")

    def restore(self, scene: str, number: int) -> VersionView:
        """Show a retired version again."""
        return self._ask(VersionView, "POST", f"{_scene(scene)}/versions/{number}/restore")

    def history(self, scene: str, alias: str | None = None) -> list[MoveView]:
        """Every move of a scene's aliases, or of one of them, oldest first."""
        parameters = {} if alias is None else {"alias": alias}
        return self._ask(MoveList, "GET", f"{_scene(scene)}/history", params=parameters).moves

    def alias(self, scene: str, alias: str = "live") -> AliasView:
        """The version that an alias points to."""
        return self._ask(AliasView, "GET", f"{_scene(scene)}/aliases/{_quoted(alias)}")

    def set_alias(
        self, scene: str, alias: str, version: int, *, expect: int | None = None
    ) -> AliasView:
        """Point an alias to a version; with ``expect`` only from the version of that number."""
        return self._ask(
            AliasView,
            "PUT",
            f"{_scene(scene)}/aliases/{_quoted(alias)}",
            json={"version": version},
            headers=_if_match(expect),
        )

    def rollback(self, scene: str, alias: str = "live", *, expect: int | None = None) -> AliasView:
        """Point an alias back to the version it left; ``expect`` as in ``set_alias``."""
        return self._ask(
            AliasView,
            "POST",
            f"{_scene(scene)}/rollback",
            params={"alias": alias},
            headers=_if_match(expect),
        )

    def ready(self) -> bool:
        """Whether the service takes completions; False also where nobody answers."""
        try:
            return self._http.get("/readyz", timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise ServiceUnreachable(
                f"{self.url} gave no answer within {self.timeout_s:g} s: wait longer with "
                "--timeout, or ask for fewer candidates or steps."
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
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
            raise self._another(answer) from error
        raise RequestRefused(
            message, status=answer.status_code, refusal=refusal, request_id=request_id
        )

    def _ask(self, view: type[View], method: str, path: str, **options: Any) -> View:
        answer = self._call(method, path, **options)
        try:
            return view.model_validate_json(answer.content)
        except ValidationError as error:
            raise self._another(answer) from error

    def _another(self, answer: httpx.Response) -> ServiceUnreachable:
        return ServiceUnreachable(
            f"{self.url} answered {answer.status_code} in another shape than this service's: "
            "check the address and the proxies on the way."
        )


def image_of(encoded: str | None) -> bytes:
    """The image file in a candidate's ``image``, which must be among the first ``top``."""
    if encoded is None:
        raise ValueError("this candidate carries no image; ask for a larger top")
    return pybase64.b64decode(encoded)


def _scene(name: str) -> str:
    """The path of a scene, or of whatever reference stands for it."""
    return f"/v1/scenes/{_quoted(name)}"


def _quoted(name: str) -> str:
    return quote(name, safe="@:", errors="replace")


def _is_here(host: str) -> bool:
    """Whether a URL's host is this machine."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _if_match(expect: int | None) -> dict[str, str]:
    return {} if expect is None else {"If-Match": f'"{expect}"'}


def _read(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()
