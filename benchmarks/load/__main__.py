"""``python -m benchmarks.load``: open-loop load on a service that runs already."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.load.driver import is_loopback, read_payload
from benchmarks.load.report import Conditions
from benchmarks.load.run import run


def _scene(value: str) -> tuple[str, Path, Path]:
    name, equals, files = value.partition("=")
    image, comma, mask = files.partition(",")
    if not (name and equals and comma):
        raise click.BadParameter(f"{value!r} is not of the form name=target.png,mask.png.")
    for path in (Path(image), Path(mask)):
        if not path.is_file():
            raise click.BadParameter(f"scene {name}: there is no file {path}; check the path.")
    return name, Path(image), Path(mask)


def _field(value: str) -> tuple[str, str]:
    name, equals, text = value.partition("=")
    if not (name and equals):
        raise click.BadParameter(f"{value!r} is not of the form name=value.")
    return name, text


@click.command()
@click.option("--url", required=True, help="Where the service listens, as http://127.0.0.1:3000.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), required=True)
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), default=30.0)
@click.option(
    "--scene",
    "scenes",
    multiple=True,
    required=True,
    metavar="NAME=TARGET,MASK",
    help="Scene, the most popular first. Repeat for more.",
)
@click.option("--field", "fields", multiple=True, metavar="NAME=VALUE", help="More form fields.")
@click.option("--zipf", type=click.FloatRange(min=0), default=1.0, help="0 for equal popularity.")
@click.option("--slo", type=click.FloatRange(min=0, min_open=True), default=3.0, help="Seconds.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0)
@click.option("--warmup", type=click.IntRange(min=0), default=1, help="Requests per scene.")
@click.option("--seed", type=int, default=0)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("load-out"))
@click.option("--allow-remote", is_flag=True, help="Send to another machine, which is yours.")
def main(
    url: str,
    rate: float,
    duration: float,
    scenes: tuple[str, ...],
    fields: tuple[str, ...],
    zipf: float,
    slo: float,
    timeout: float,
    warmup: int,
    seed: int,
    out: Path,
    allow_remote: bool,
) -> None:
    """Send Poisson arrivals over Zipf-popular scenes and report latency from when each was due."""
    if not allow_remote and not is_loopback(url):
        raise click.UsageError(
            f"{url} is not a loopback address, and load on other people's machines does harm:"
            " add --allow-remote if the machine is yours."
        )
    form = dict(_field(field) for field in fields)
    payloads = {name: read_payload(image, mask, form) for name, image, mask in map(_scene, scenes)}
    conditions = Conditions(
        url=url,
        rate_per_s=rate,
        duration_s=duration,
        zipf_s=zipf,
        seed=seed,
        warmup=warmup,
        timeout_s=timeout,
        slo_s=slo,
        scenes=tuple(payloads),
        payload_bytes={name: payload.size_bytes for name, payload in payloads.items()},
        fields=form,
    )
    run(conditions, payloads, out)


if __name__ == "__main__":
    main()
