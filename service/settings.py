"""Settings of the service: environment variables ``REALFILL_*``, checked once, at the start."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import InvalidSettings

PREFIX = "REALFILL_"

SamplerName = Literal["ddpm", "ddim", "ddim-quadratic", "dpm++2m", "dpm++2m-sde"]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """Everything an operator may choose; each field is the variable ``REALFILL_<FIELD>``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    registry: str = Field("./realfill-registry", description="Folder or URL of the registry.")
    registry_database: str | None = Field(None, description="URL of its database, if elsewhere.")
    registry_verify: Literal["off", "warn", "require"] = Field(
        "off", description="What to do about capsules that nobody trusted has signed."
    )
    registry_keys: str = Field(
        "", description="Public keys that are trusted: PEM files, separated as in PATH."
    )
    base: str = Field("nano", description="nano, sd2, sd2-random, a folder or a hub id.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "xformers", "sdpa", "cudnn"] = "auto"
    adapters: Literal["auto", "fused", "segmented"] = Field(
        "auto",
        description="Whole weights per scene (fused, CPU) or low-rank terms (segmented, GPU).",
    )
    matcher: str = Field(
        "nano",
        description="nano, outdoor or a LoFTR weights file, torch: or onnx: in front choosing the "
        "program; efficientloftr:FOLDER, sift, or none.",
    )
    efficientloftr: str | None = Field(None, description="Folder of EfficientLoFTR's weights.")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(3000, ge=0, le=65535)
    allow_remote: bool = Field(False, description="Listen beyond loopback without authentication.")

    max_body_bytes: Count = 32 * 1024 * 1024
    max_pixels: Count = 25_000_000
    max_samples: Count = Field(16, description="Candidates of one request, and of one batch.")
    max_queue: Count = Field(16, description="Requests that may wait for the lane.")
    max_running: int | None = Field(
        None, ge=1, description="Requests that share the batches; else four batches of samples."
    )
    split_from: int | None = Field(
        None,
        ge=1,
        description="Samples of one scene from which they run in a call of their own; else 8 on a "
        "CPU, but never where a few cores share each batch, nor on a GPU.",
    )
    arena_bytes: int | None = Field(
        None, ge=1, description="Adapters ready on the device; else 1 GiB on a CPU, 4 on a GPU."
    )
    host_bytes: Count = Field(2**30, description="Capsules kept in memory.")
    registry_patience_s: Seconds = Field(
        2.0, description="After so long what a scene meant last is served."
    )
    request_timeout_s: Seconds = 60.0
    lease_s: float = Field(
        300.0, ge=10, description="Claims on capsules in memory expire so long after a renewal."
    )

    candidates: Count = Field(4, description="Default of the request field of that name.")
    steps: int | None = Field(
        None, ge=1, le=1000, description="Default of the request field; else the base's own."
    )
    sampler: SamplerName | None = Field(
        None, description="Default of the request field; else the base's own."
    )
    feather_px: int = Field(8, ge=0, le=256, description="Default of the request field.")
    seamless: bool = Field(True, description="Default of the request field.")
    halving: bool = Field(False, description="Default of the request field.")

    @field_validator("host")
    @classmethod
    def _host_is_an_address(cls, host: str) -> str:
        address = "127.0.0.1" if host == "localhost" else host
        ipaddress.ip_address(address)
        return address

    @model_validator(mode="after")
    def _remote_is_asked_for(self) -> Settings:
        if not ipaddress.ip_address(self.host).is_loopback and not self.allow_remote:
            raise ValueError(
                f"the host {self.host} is reachable from outside and this service has no "
                "authentication yet: listen on 127.0.0.1 behind a proxy that authenticates, "
                f"or set {PREFIX}ALLOW_REMOTE=true"
            )
        if self.candidates > self.max_samples:
            raise ValueError(
                f"the default of {self.candidates} candidates is above max_samples "
                f"{self.max_samples}: lower {PREFIX}CANDIDATES or raise {PREFIX}MAX_SAMPLES"
            )
        return self


# Variables of the tests, the benchmarks and the registry, which may be set where a service starts.
_OF_OTHERS = {
    PREFIX + name
    for name in (
        "SCENES",
        "COMMIT",
        "REGISTRY_CACHE",
        "REGISTRY_CACHE_BYTES",
        "WEBHOOK_SECRET",
        "SIGNING_PASSWORD",
        "LPIPS",
        "DINO",
        "CLIP",
        "DREAMSIM",
    )
}


def load_settings(**overrides: Any) -> Settings:
    """Read the settings, or refuse them in one sentence.

    Args:
        overrides: Fields that win over the environment, such as a command's options.

    Raises:
        InvalidSettings: A setting is unknown, out of range or unsafe.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    mine = [name for name in os.environ if name.upper().startswith(PREFIX)]
    unknown = sorted(name for name in mine if name.upper() not in known | _OF_OTHERS)
    if unknown:
        raise InvalidSettings(
            f"Unknown setting {', '.join(unknown)}: unset it, or use one of "
            f"{', '.join(sorted(known))}."
        )
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise InvalidSettings(_sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    """The first fault of many, as one sentence with the variable's name and value."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{message[0].upper()}{message[1:]}."
    name = PREFIX + str(first["loc"][0]).upper()
    return f"{name} is {first['input']!r}: {message[0].lower()}{message[1:]}; correct or unset it."
