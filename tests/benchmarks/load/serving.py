"""A small real service: it answers the contract's path in time, late, busy or broken, by scene.

Run as a program it stands in for ``realfill serve``.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Response
from fastapi.requests import Request
from starlette.datastructures import FormData, UploadFile

SLOW_S = 0.4


@dataclass
class Seen:
    """What the service received, in order."""

    requests: list[dict[str, str | int]] = field(default_factory=list)


def application(seen: Seen) -> FastAPI:
    """Scenes: ``slow`` takes 0.4 s, ``busy`` gives 429, ``broken`` 500, ``hung`` no answer soon.

    ``late`` gives a partial answer.
    """
    app = FastAPI()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/scenes/{scene}/complete")
    async def complete(scene: str, request: Request) -> Response:
        async with request.form() as form:
            seen.requests.append({"scene": scene, **await _sizes(form)})
        if scene == "busy":
            return Response(status_code=429, headers={"Retry-After": "3"}, content="queue full")
        if scene == "broken":
            return Response(status_code=500, content="no luck")
        if scene == "absent":
            return Response(status_code=404, content="no such scene")
        await asyncio.sleep({"slow": SLOW_S, "hung": 5.0}.get(scene, 0.0))
        headers = {"X-RealFill-Timings": "sample;dur=1.5"}
        if scene == "late":
            headers["X-RealFill-Partial"] = "3/16"
        return Response(content=b"image", headers=headers)

    return app


async def _sizes(form: FormData) -> dict[str, str | int]:
    return {
        name: len(await value.read()) if isinstance(value, UploadFile) else value
        for name, value in form.items()
    }


@contextmanager
def served(seen: Seen) -> Iterator[str]:
    """Run the service in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(application(seen), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--registry", required=True)
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(application(Seen()), port=parser.parse_args().port)
