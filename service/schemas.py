"""What the routes read and write, as pydantic models; OpenAPI is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from realfill.verdict import Verdict
from registry.records import LIVE, MAX_NUMBER, AliasMove, Page, Scene, Version
from registry.search import Query
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
    deadline_ms: Annotated[
        int | None,
        Field(
            ge=1,
            le=86_400_000,
            description="Answer by then with the candidates that are finished; a day at most.",
        ),
    ] = None
    evidence: Annotated[
        bool, Field(description="Draw the correspondences of the first `top` candidates, in JSON.")
    ] = False
    halving: Annotated[
        bool | None, Field(description="Give up the worse candidates half-way, to save time.")
    ] = None


class CandidateView(BaseModel):
    """One candidate, best first in its list; evidence is null where nothing was ranked."""

    seed: int
    agreement: float | None = Field(
        description="Correspondences in the filled region that lie where the known region puts "
        "them in the references; the order."
    )
    score: int | None = Field(description="All sure correspondences in the filled region.")
    per_reference: list[int] | None = Field(description="The same, for each reference.")
    confidence: float | None = Field(description="Sum of the correspondences' confidences.")
    coverage: float | None = Field(description="Share of the hole that a reference matches.")
    verdict: Verdict | None = Field(description="Whether the references support the filling.")
    image: str | None = Field(description="Base64; null beyond the first `top` candidates.")
    evidence: str | None = Field(
        description="Base64 PNG: its correspondences drawn; null unless evidence was asked for."
    )


class CompletionView(BaseModel):
    """The JSON answer to a completion."""

    request_id: str
    scene: str
    version: int
    digest: str
    base_fingerprint: str
    ranked: bool = Field(description="False where the capsule carries no references to rank by.")
    margin: float | None = Field(description="The best candidate's agreement minus the median.")
    partial: bool = Field(description="Whether the deadline came before all were finished.")
    asked: int = Field(description="Candidates that were asked for.")
    stale: bool = Field(description="Whether the registry was away, so the alias may have moved.")
    sampler: str
    steps: int
    feather_px: int
    seamless: bool
    format: ImageFormat
    candidates: list[CandidateView]
    timings_ms: dict[str, float]


class SceneFields(BaseModel):
    """The query string of a page of scenes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[str, Field(description="Name of the last scene of the page before.")] = ""
    limit: Annotated[int, Field(ge=1, le=1000, description="Scenes of one page.")] = 100


class VersionFields(BaseModel):
    """The query string of a page of one scene's versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: Annotated[
        int | None,
        Field(ge=1, le=MAX_NUMBER, description="Number of the last version of the page before."),
    ] = None
    limit: Annotated[int, Field(ge=1, le=1000, description="Versions of one page.")] = 100


class AliasFields(BaseModel):
    """The query string of what moves an alias."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alias: Annotated[str, Field(description="The alias that moves.")] = LIVE


class SearchFields(BaseModel):
    """The query string of a search; every condition that is given must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scene: str | None = None
    text: Annotated[str | None, Field(description="Occurs in scene, person or prompt.")] = None
    tag: Annotated[
        list[str], Field(description="KEY or KEY=VALUE, which it has; may be repeated.")
    ] = []
    base: Annotated[str | None, Field(description="Name or fingerprint of the base.")] = None
    rank: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    metric: Annotated[
        list[str], Field(description="Comparison such as psnr>=20; may be repeated.")
    ] = []
    since: Annotated[
        datetime | None, Field(description="Published then or later; UTC where it has no zone.")
    ] = None
    until: Annotated[datetime | None, Field(description="Published before.")] = None
    alias: Annotated[str | None, Field(description="An alias of this name points to it.")] = None
    retired: Annotated[bool, Field(description="Also retired versions.")] = False
    after: Annotated[str | None, Field(description="What the page before gave.")] = None
    limit: Annotated[int, Field(ge=1, le=1000, description="Versions of one page.")] = 100

    @field_validator("tag")
    @classmethod
    def _keys_differ(cls, tags: list[str]) -> list[str]:
        if len({tag.partition("=")[0] for tag in tags}) < len(tags):
            # No version has two values of one key; the latter alone would be looked for.
            raise PydanticCustomError("repeated_key", "each key may be given once")
        return tags

    @field_validator("since", "until")
    @classmethod
    def _in_utc(cls, moment: datetime | None) -> datetime | None:
        if moment is None:
            return None
        # Beyond, another zone's moment may have no name in UTC.
        if not 1970 <= moment.year <= 9998:
            raise PydanticCustomError("year", "its year should be 1970 to 9998")
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    @classmethod
    def of(cls, query: Query, after: str | None, limit: int) -> SearchFields:
        """The query string that asks for a page of a registry's query."""
        return cls(
            scene=query.scene,
            text=query.text,
            tag=[key if value is None else f"{key}={value}" for key, value in query.tags.items()],
            base=query.base,
            rank=query.rank,
            metric=list(query.metrics),
            since=query.since,
            until=query.until,
            alias=query.alias,
            retired=query.retired,
            after=after,
            limit=limit,
        )

    def query(self) -> Query:
        """The registry's query; raises InvalidReference where a condition is malformed."""
        tags = (tag.partition("=") for tag in self.tag)
        return Query(
            scene=self.scene,
            text=self.text,
            tags={key: value or None for key, _, value in tags},
            base=self.base,
            rank=self.rank,
            metrics=self.metric,
            since=self.since,
            until=self.until,
            alias=self.alias,
            retired=self.retired,
        )


class HistoryFields(BaseModel):
    """The query string of a history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alias: Annotated[str | None, Field(description="Only the moves of this alias.")] = None


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
    parent: int | None = Field(description="The version that training began from.")
    tags: dict[str, str]
    metrics: dict[str, float]
    retired: datetime | None = Field(description="When it was hidden.")
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
            parent=version.parent,
            tags=dict(version.tags),
            metrics=dict(version.metrics),
            retired=version.retired,
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


class VersionPage(BaseModel):
    """Some of the versions that a search found, newest first."""

    versions: list[VersionView]
    after: str | None = Field(description="Parameter for the next page; null on the last.")

    @classmethod
    def of(cls, page: Page) -> VersionPage:
        """The view of a registry's page."""
        return cls(
            versions=[VersionView.of(version) for version in page.versions], after=page.after
        )


class MoveView(BaseModel):
    """One step of an alias from a version to another."""

    alias: str
    previous: int | None = Field(description="The version it left; null where it was created.")
    version: int
    action: str = Field(description="publish, alias, promote or rollback.")
    moved: datetime
    moved_by: str

    @classmethod
    def of(cls, move: AliasMove) -> MoveView:
        """The view of a registry's record."""
        return cls(
            alias=move.alias,
            previous=move.previous,
            version=move.number,
            action=move.action,
            moved=move.moved,
            moved_by=move.moved_by,
        )


class MoveList(BaseModel):
    """Moves of a scene's aliases, oldest first."""

    moves: list[MoveView]


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
