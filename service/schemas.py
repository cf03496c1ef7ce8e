"""What the routes read and write, as pydantic models; OpenAPI is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.records import Scene, Version
from service.settings import SamplerName

ImageFormat = Literal["png", "jpeg", "webp"]
MAX_SEED = 2**53 - 1


class CompletionFields(BaseModel):
    """Text fields beside ``image`` and ``mask``; an absent field takes the service's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="Seed of the first candidate.")] = 0
    candidates: Annotated[int | None, Field(ge=1, description="Seeds to sample and rank.")] = None
    top: Annotated[
        int | None, Field(ge=1, description="Candidates whose image the JSON answer carries.")
    ] = None
    steps: Annotated[int | None, Field(ge=1, le=1000, description="Denoising steps.")] = None
    sampler: Annotated[SamplerName | None, Field(description="Way from noise to image.")] = None
    feather_px: Annotated[
        int | None, Field(ge=0, le=256, description="Blend on the known side of the mask, in px.")
    ] = None
    seamless: Annotated[
        bool | None, Field(description="Shift fills to meet the known pixels around them.")
    ] = None
    format: Annotated[ImageFormat | None, Field(description="Encoding of images.")] = None


class CandidateView(BaseModel):
    """One candidate, best first in its list; evidence is null where nothing was ranked."""

    seed: int
    score: int | None = Field(description="Correspondences between filled region and references.")
    per_reference: list[int] | None = Field(description="The same, for each reference.")
    confidence: float | None = Field(description="Sum of the correspondences' confidences.")
    coverage: float | None = Field(description="Share of the hole that a reference matches.")
    image: str | None = Field(description="Base64; null beyond the first `top` candidates.")


class CompletionView(BaseModel):
    """The JSON answer to a completion."""

    request_id: str
    scene: str
    version: int
    digest: str
    base_fingerprint: str
    ranked: bool = Field(description="False where the capsule carries no references to rank by.")
    margin: float | None = Field(description="Best score minus the median score.")
    sampler: str
    steps: int
    feather_px: int
    seamless: bool
    format: ImageFormat
    candidates: list[CandidateView]
    timings_ms: dict[str, float]


class VersionView(BaseModel):
    """One version of a scene's adapter."""

    scene: str
    version: int
    digest: str
    tensor_digest: str
    size_bytes: int
    base: str
    base_fingerprint: str
    rank: int
    created: datetime
    created_by: str
    aliases: list[str]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, version: Version) -> VersionView:
        """The view of a registry's record."""
        return cls(
            scene=version.scene,
            version=version.number,
            digest=version.digest,
            tensor_digest=version.tensor_digest,
            size_bytes=version.size_bytes,
            base=version.base,
            base_fingerprint=version.base_fingerprint,
            rank=version.rank,
            created=version.created,
            created_by=version.created_by,
            aliases=list(version.aliases),
            metadata=dict(version.metadata),
        )


class SceneView(BaseModel):
    """One scene, with the aliases of its versions."""

    name: str
    created: datetime
    latest: int
    versions: int
    aliases: Mapping[str, int]

    @classmethod
    def of(cls, scene: Scene) -> SceneView:
        """The view of a registry's record."""
        return cls(
            name=scene.name,
            created=scene.created,
            latest=scene.latest,
            versions=scene.versions,
            aliases=dict(scene.aliases),
        )


class SceneList(BaseModel):
    """All scenes, by name."""

    scenes: list[SceneView]


class VersionList(BaseModel):
    """All versions of one scene."""

    versions: list[VersionView]


class AliasTarget(BaseModel):
    """The version that an alias shall point to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[int, Field(ge=1)]


class AliasView(BaseModel):
    """An alias after it was set."""

    scene: str
    alias: str
    version: int


class Fault(BaseModel):
    """What went wrong, and what to do about it."""

    code: str
    message: str
    request_id: str


class ErrorView(BaseModel):
    """The one shape of every error."""

    error: Fault
