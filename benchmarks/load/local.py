"""``python -m benchmarks.load.local``: load on the demo scenes, from nothing.

Runs the demo if its folder is absent, starts a server on a free port, drives it, stops it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
import httpx

from benchmarks.load.driver import Payload, read_payload
from benchmarks.load.report import Conditions
from benchmarks.load.run import run
from service.libraries import begin_as_served

STOP_S = 20.0
STOP_AGAIN_S = 5.0


def demo_payloads(folder: Path, fields: dict[str, str]) -> dict[str, Payload]:
    """Payloads of every scene in the demo's folder, by name, in sorted order.

    Raises:
        FileNotFoundError: The folder holds no scene with target.png and mask.png.
    """
    payloads = {}
    for target in sorted(folder.glob("*/target/target.png")):
        mask = target.with_name("mask.png")
        if mask.is_file():
            payloads[target.parents[1].name] = read_payload(target, mask, fields)
    if not payloads:
        raise FileNotFoundError(
            f"{folder} holds no <scene>/target/target.png with a mask.png beside it: remove the"
            " folder and run the demo again."
        )
    return payloads


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    command: list[str],
    url: str,
    *,
    log: Path,
    start_s: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server process for the length of the block, from its /readyz on.

    Args:
        command: What starts it.
        url: Where it will listen.
        log: File for what it prints.
        start_s: Longest to wait for it.
        environment: Variables of the process, by default this one's.

    Yields:
        The process. After the block it has ended, with its status in ``returncode``.

    Raises:
        RuntimeError: It ended, or was not ready within ``start_s``; the message names its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A session of its own, so that workers which the server starts are stopped with it.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            _wait_until_ready(process, url, log, start_s)
            yield process
        finally:
            _stop(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, log: Path, start_s: float
) -> None:
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"The server ended with status {process.returncode} before it was ready; see {log}."
            )
        try:
            # While a worker loads, the port is open and hangs: keep the probe short.
            if httpx.get(f"{url}/readyz", timeout=1.0, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"The server was not ready within {start_s:g} s; see {log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        # Asked twice, `realfill serve` ends its worker too, which has a session of its own.
        process.terminate()
        try:
            process.wait(STOP_AGAIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@click.command()
@click.option(
    "--demo",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    help="Folder of the demo; made if absent.",
)
@click.option("--demo-command", default="realfill demo", help="What makes the folder.")
@click.option(
    "--serve-command", default="realfill serve", help="Gets --registry FOLDER --port PORT."
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=1.0)
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), default=30.0)
@click.option("--candidates", type=click.IntRange(min=1), default=1, help="Per request.")
@click.option("--slo", type=click.FloatRange(min=0, min_open=True), default=3.0, help="Seconds.")
@click.option("--zipf", type=click.FloatRange(min=0), default=1.0, help="0 for equal popularity.")
@click.option("--seed", type=int, default=0)
@click.option("--start-timeout", type=float, default=120.0, help="Seconds.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("load-out"))
def main(
    demo: Path,
    demo_command: str,
    serve_command: str,
    rate: float,
    duration: float,
    candidates: int,
    slo: float,
    zipf: float,
    seed: int,
    start_timeout: float,
    out: Path,
) -> None:
    """Load on the demo scenes; the demo is run and the server started if need be."""
    fields = {"candidates": str(candidates)}
    try:
        if not demo.exists():
            click.echo(f"{demo} is absent: running {demo_command} first.")
            subprocess.run(shlex.split(demo_command), check=True)
        payloads = demo_payloads(demo, fields)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        words = [*shlex.split(serve_command), "--registry", str(demo / "registry")]
        conditions = Conditions(
            url=url,
            rate_per_s=rate,
            duration_s=duration,
            zipf_s=zipf,
            seed=seed,
            warmup=1,
            timeout_s=60.0,
            slo_s=slo,
            scenes=tuple(payloads),
            payload_bytes={name: payload.size_bytes for name, payload in payloads.items()},
            fields=fields,
        )
        with serving(
            [*words, "--port", str(port)], url, log=out / "server.log", start_s=start_timeout
        ):
            run(conditions, payloads, out)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    begin_as_served()
    main()
