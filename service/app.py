"""The BentoML service: the shell around the FastAPI app of ``http.py``.

Imported by ``bentoml build`` and by the supervisor too, so that everything heavy is imported where
a worker needs it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from service.settings import Settings, load_settings

if TYPE_CHECKING:
    from service.road import Road

log = logging.getLogger("service.app")
settings = load_settings()

# BentoML's own timeout is a net below ours: it answers in another shape and cancels no thread.
_NET_S = 30.0
# Of Linux' <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


class Front:
    """Stands where BentoML mounts an app at import; passes requests on to this worker's app.

    Not a Starlette app, which BentoML would ask for each path: so our 404 and 405 win over its.
    """

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        assert self.app is not None, "BentoML creates the service before it serves"
        await self.app(scope, receive, send)


front = Front()


class ProbesFirst:
    """Lets our own probes answer, before whose routes BentoML has its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        ours = scope["type"] == "http" and scope["path"] in ("/livez", "/readyz")
        await (front if ours else self.app)(scope, receive, send)


def build_road(settings: Settings) -> Road:
    """Load the base and join it with registry, engine and matcher.

    Raises:
        RealFillError: The base or the matcher cannot be had.
        RegistryError: The registry cannot be opened.
        ValueError: The attention or the device does not suit this machine.
    """
    import torch

    from realfill.base import load_base
    from realfill.precision import serving_precision
    from realfill.rank import load_matcher
    from registry import Registry
    from registry.signing import Guard, Policy
    from service.engine import Engine
    from service.road import Road

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = serving_precision(device, settings.dtype)
    registry = Registry.open(settings.registry, database=settings.registry_database)
    matcher = None if settings.matcher == "none" else load_matcher(settings.matcher, device)
    base = load_base(settings.base, device=device, **precision._asdict())
    # Capsules bring their prompts encoded: of the text encoder only its shapes are asked for.
    base.text_encoder.to("meta")
    engine = Engine(
        base,
        attention=settings.attention,
        application=settings.adapters,
        arena_bytes=settings.arena_bytes,
        split_from=settings.split_from,
        max_samples=settings.max_samples,
        max_queue=settings.max_queue,
        max_running=settings.max_running,
    )
    keys = [Path(key) for key in settings.registry_keys.split(os.pathsep) if key]
    guard = Guard(Policy(settings.registry_verify), keys)
    return Road(
        base,
        registry,
        engine,
        matcher,
        host_bytes=settings.host_bytes,
        guard=guard,
        lease_s=settings.lease_s,
        patience_s=settings.registry_patience_s,
    )


@bentoml.service(
    name="realfill",
    workers=1,
    traffic={"timeout": settings.request_timeout_s + _NET_S},
    http={"host": settings.host, "port": settings.port},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(front, path="/")
class Completer:
    """Completes photographs of the scenes in its registry."""

    def __init__(self) -> None:
        import torch

        from service.http import create_app
        from service.middleware import log_to_stderr

        log_to_stderr()
        _end_with_the_supervisor()
        try:
            # In a thread that ends: the team that loads the base would slow the lane's down.
            with ThreadPoolExecutor(1, "builder") as builder:
                self.road = builder.submit(build_road, settings).result()
            torch.set_num_threads(1)
            front.app = create_app(self.road, settings)
            self.road.start()
        # Whatever it is, it would happen again in the next worker.
        except Exception as error:  # noqa: BLE001 - it ends the service
            _give_up(error)

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check_registry() -> None:
        """Fail in the supervisor, once, rather than in worker after worker."""
        from registry import Registry, RegistryError

        try:
            registry = Registry.open(settings.registry, database=settings.registry_database)
            registry.scenes(limit=1)
            registry.close()
        except RegistryError as error:
            sys.exit(f"Error: {error}")

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """End the lane and the registry's connections."""
        self.road.close()
        self.road.registry.close()

    def __is_alive__(self) -> bool:
        """For /healthz, which is BentoML's."""
        return self.road.alive


Completer.add_asgi_middleware(ProbesFirst)  # type: ignore[attr-defined]


def _end_with_the_supervisor() -> None:
    """Let this process be told to end when its supervisor has, also where that was killed.

    It would go on otherwise, in a session of its own, and hold the port. Linux alone knows how.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _give_up(error: Exception) -> NoReturn:
    """End the whole service: the supervisor would respawn a worker that cannot start for ever."""
    if not hasattr(error, "code"):
        log.error("the service cannot start", exc_info=error)
    if bentoml.server_context.worker_index is None:
        raise error
    print(f"Error: {error}", file=sys.stderr, flush=True)
    # The supervisor ends its workers by SIGTERM. Wait for it: one that exits by itself meanwhile
    # makes the supervisor wait for a process that is no longer there.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(_NET_S)
    # Without the noise of unwinding BentoML's start; nothing is open yet.
    os._exit(1)
