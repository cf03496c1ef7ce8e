"""The commands ``serve``, ``complete`` and ``demo``."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import httpx

from registry import Registry, RegistryError
from registry.address import CACHE_VARIABLE
from service.client import DEFAULT_TIMEOUT_S, DEFAULT_URL, Client, image_of
from service.errors import ServiceError
from service.libraries import library_variables
from service.settings import PREFIX, SamplerName, Settings, load_settings

# Above the service's own request limit, so that requests in flight are answered first.
_GRACE_S = 10.0
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
# What may stand before the weights of a matcher, and names that no file beside them takes over.
_PROGRAMS = ("torch", "onnx", "efficientloftr")
_NAMES = ("nano", "sd2-random", "outdoor", "sift", "none", "efficientloftr", "")
_SAMPLERS = click.Choice(SamplerName.__args__)  # type: ignore[attr-defined]


class Refusal(click.ClickException):
    """One sentence and exit status 2."""

    exit_code = 2


@click.command()
@click.option("--host", help="Address to listen on; loopback unless allowed otherwise.")
@click.option("--port", type=int, help="Port to listen on; 0 chooses a free one.")
@click.option("--registry", help="Folder or URL of the registry.")
@click.option("--base", help="nano, sd2, a folder or a hub id.")
@click.option("--device", help="auto, cpu or cuda.")
@click.option("--matcher", help="nano, outdoor, a weights file, or none.")
def serve(**options: Any) -> None:
    """Serve completions of the registry's scenes over HTTP.

    Further settings are environment variables REALFILL_*.
    """
    try:
        settings = load_settings(**{k: v for k, v in options.items() if v is not None})
    except ServiceError as error:
        raise Refusal(str(error)) from error
    try:
        # Before anything heavy starts; the supervisor checks it again for who starts it directly.
        Registry.open(settings.registry, database=settings.registry_database).close()
    except RegistryError as error:
        raise Refusal(str(error)) from error
    settings = settings.model_copy(update={"port": free_port(settings.host, settings.port)})
    with tempfile.TemporaryDirectory(prefix="realfill-serve-") as home:
        # A home of its own: a second server in a shared one deletes the first one's files.
        environment = {**os.environ, **environment_of(settings), "BENTOML_HOME": home}
        try:
            status = _supervise(settings, environment)
        except ServiceError as error:
            raise Refusal(str(error)) from error
    sys.exit(status)


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as variables, paths made absolute since the service has another folder."""
    values: dict[str, Any] = settings.model_dump(exclude_unset=True)
    values["registry"] = _absolute_address(settings.registry)
    if settings.registry_database:
        values["registry_database"] = _absolute_address(settings.registry_database)
    keys = [key for key in settings.registry_keys.split(os.pathsep) if key]
    values["registry_keys"] = os.pathsep.join(str(Path(key).resolve()) for key in keys)
    values["base"] = _absolute_weights(settings.base)
    values["matcher"] = _absolute_weights(settings.matcher)
    if settings.efficientloftr:
        values["efficientloftr"] = str(Path(settings.efficientloftr).resolve())
    # No setting of the service: the registry reads it by itself.
    if cache := os.environ.get(CACHE_VARIABLE):
        values["registry_cache"] = str(Path(cache).resolve())
    variables = {PREFIX + name.upper(): str(value) for name, value in values.items()}
    return {**variables, **library_variables(), "BENTOML_DO_NOT_TRACK": "True"}


def _absolute_address(address: str) -> str:
    """A folder, or the URL of one or of an SQLite file, whose path is absolute; others as is."""
    scheme, mark, path = address.removeprefix("file://").partition("://")
    if not mark:
        return str(Path(scheme).resolve())
    file, *options = path.removeprefix("/").split("?", 1)
    if not scheme.startswith("sqlite") or not file or file.startswith((":memory:", "file:")):
        return address
    return "?".join([f"{scheme}:///{Path(file).resolve()}", *options])


def _absolute_weights(name: str) -> str:
    """Where a folder or a file is named, by its absolute path; the program in front stays."""
    program, mark, place = name.partition(":")
    if program not in _PROGRAMS or not mark:
        program, mark, place = "", "", name
    if place in _NAMES or not Path(place).exists():
        return name
    return f"{program}{mark}{Path(place).resolve()}"


def _supervise(settings: Settings, environment: Mapping[str, str]) -> int:
    """Run BentoML's supervisor until it ends or a signal asks for it; the exit status."""
    address = settings.host if ":" not in settings.host else f"[{settings.host}]"
    url = f"http://{address}:{settings.port}"
    server: subprocess.Popen[bytes] | None = None
    asked = False

    def end(number: int, frame: object) -> None:
        nonlocal asked
        again, asked = asked, True
        if server is not None:
            # Asked twice, it does not wait for the requests in flight.
            _kill(server) if again else server.terminate()

    # Before it starts, so that no signal ends this process alone.
    previous = {number: signal.signal(number, end) for number in _ends()}
    try:
        server = _start(settings, environment)
        if asked:
            server.terminate()
        # This machine, whatever its address: no proxy is asked.
        with Client(url, transport=httpx.HTTPTransport()) as client:
            if _wait_until_ready(client, server):
                _announce(client)
        while server.poll() is None and not asked:
            time.sleep(0.1)
        return _end(server, settings.request_timeout_s + _GRACE_S, asked)
    finally:
        if server is not None:
            _kill(server)
            server.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ends() -> list[signal.Signals]:
    """What ends the service: Ctrl-C, kill, and a terminal that closes unless nohup hides it."""
    hidden = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if hidden else [signal.SIGHUP])]


def _start(settings: Settings, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    folder = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "bentoml", "serve", "service.app:Completer"]
    command += ["--host", settings.host, "--port", str(settings.port)]
    # In a session of its own, so that Ctrl-C reaches this process alone and ends it in order.
    return subprocess.Popen(
        [*command, "--working-dir", str(folder)], env=environment, start_new_session=True
    )


def _kill(server: subprocess.Popen[bytes]) -> None:
    """End the supervisor and its workers, each of which has a session of its own, at once."""
    if server.poll() is not None:
        return
    workers: list[int] = []
    # Where there is no such file, as beyond Linux, workers are not found.
    with suppress(OSError):
        listed = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
        workers = [int(pid) for pid in listed.split()]
    server.kill()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes], patience_s: float, asked: bool) -> int:
    """Wait for the supervisor to end; 0 where it was asked to, else 2."""
    try:
        server.wait(patience_s)
    except subprocess.TimeoutExpired:
        _kill(server)
        server.wait()
    if asked:
        click.echo("Stopped.")
        return 0
    click.echo("The service ended by itself; its last lines say why.", err=True)
    return 2


def _wait_until_ready(client: Client, server: subprocess.Popen[bytes]) -> bool:
    """False where the supervisor ended first."""
    while server.poll() is None:
        if client.ready():
            return True
        time.sleep(0.2)
    return False


def _announce(client: Client) -> None:
    scenes = client.scenes()
    name = scenes[0].name if scenes else "SCENE"
    click.echo(f"Listening on {client.url} with {len(scenes)} scene(s); Ctrl-C ends it. Try:\n")
    click.echo(
        f"  curl -F image=@target.png -F mask=@mask.png {client.url}/v1/scenes/{name}/complete "
        "-o best.png\n"
    )


def free_port(host: str, port: int = 0) -> int:
    """This port, or any for 0; Refusal where it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the service does: connections that ended a moment ago are not in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Refusal(f"Port {port} is in use: choose another with --port.") from error
            raise Refusal(
                f"{host} port {port} cannot be listened on ({error.strerror}): choose others with "
                "--host and --port."
            ) from error
        return int(probe.getsockname()[1])


@click.command()
@click.argument("scene")
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("mask", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="best.png",
    show_default=True,
    help="Where to write the best candidate; png, jpg or webp.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the evidence as JSON.")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Where the service listens.")
@click.option(
    "--timeout",
    type=click.IntRange(1, 86_400),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Seconds to wait for the answer.",
)
@click.option("--seed", type=int, help="Seed of the first candidate.")
@click.option("--candidates", type=int, help="Seeds to sample and rank.")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--sampler", type=_SAMPLERS, help="Way from noise to image.")
@click.option("--feather-px", type=int, help="Blend around the mask, in pixels.")
def complete(
    scene: str,
    image: Path,
    mask: Path,
    out: Path,
    as_json: bool,
    url: str,
    timeout: int,
    **fields: Any,
) -> None:
    """Complete IMAGE, whose hole is white in MASK, as a photo of SCENE."""
    image_format = _FORMATS.get(out.suffix.lower())
    if image_format is None:
        raise Refusal(f"--out is {out}: end its name in {', '.join(_FORMATS)}.")
    if not _may_write(out):
        raise Refusal(f"{out} cannot be written: create {out.parent}, or name another with --out.")
    try:
        with Client(url, timeout_s=timeout) as client:
            answer = client.complete(scene, image, mask, top=1, format=image_format, **fields)
    except ServiceError as error:
        raise Refusal(str(error)) from error
    best = answer.candidates[0]
    try:
        out.write_bytes(image_of(best.image))
    except OSError as error:
        raise Refusal(f"{out} cannot be written: {error.strerror}.") from error
    if as_json:
        evidence = answer.model_dump(mode="json", exclude={"candidates": {"__all__": {"image"}}})
        click.echo(json.dumps(evidence, indent=2))
        return
    score = "not ranked" if best.score is None else f"score {best.score}"
    click.echo(
        f"{out}: {answer.scene} version {answer.version}, seed {best.seed}, {score}, best of "
        f"{len(answer.candidates)}, {answer.timings_ms['total'] / 1000:.2f} s"
    )


def _may_write(file: Path) -> bool:
    if os.access(file, os.F_OK):
        return os.access(file, os.W_OK)
    return file.parent.is_dir() and os.access(file.parent, os.W_OK)


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="demo-out",
    show_default=True,
    help="Folder for scenes, capsules, registry, sheet and report.",
)
@click.option("--preset", "preset_name", default="demo", show_default=True, help="Training preset.")
@click.option("--keep", is_flag=True, help="Leave the server running, and say what to try next.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def demo(out: Path, preset_name: str, keep: bool, as_json: bool) -> None:
    """Train two scenes, publish them, serve them, complete over HTTP, rank, and show it.

    Scene 1 is a real stereo pair of a motorcycle; scene 2 a cup of coffee seen from four
    viewpoints. The embedded base nano is used: no GPU and no download.
    """
    # Here, so that the list of commands is shown without torch.
    from service.demo import run_demo

    run_demo(out, preset_name, keep=keep, as_json=as_json)
