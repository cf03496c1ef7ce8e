"""The tables. What a version or a move is, once written, is never rewritten.

    scenes ─┬─ versions ─┬─ blobs ── leases   bytes shared by digest, and who serves them
            │            └─ tags, metrics     what people and measurements say of a version
            ├─ aliases, protected_aliases     where each name points now, and which are guarded
            └─ alias_moves                    every step it took: rollback reads them
    audit, outbox                             one row each per change, in its transaction
    endpoints ── deliveries                   who is told of them by webhook, and who took what
    tombstones                                names of scenes that were erased for good

`registry/migrations` builds the same tables; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

# The revision that this code reads and writes: the newest file of migrations/versions.
REVISION = "0003"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Moment(TypeDecorator[datetime]):
    """A time in UTC; SQLite forgets the zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


# SQLite counts rows by itself only in a column of type INTEGER.
Identity = BigInteger().with_variant(Integer, "sqlite")
Document = JSON().with_variant(JSONB(), "postgresql")
Name = String(63)
Digest = String(64)
Person = String(200)
TEXT_LENGTH = 300
VALUE_LENGTH = 200
ADDRESS_LENGTH = 500
FAILURE_LENGTH = 500
# Address of the endpoint that stands for those of an older registry, which kept no names.
UNNAMED = ""

scenes = Table(
    "scenes",
    metadata,
    Column("id", Identity, primary_key=True),
    Column("name", Name, nullable=False, unique=True),
    Column("last_number", Integer, nullable=False),
    Column("created", Moment, nullable=False),
    CheckConstraint("last_number >= 0", name="last_number"),
)

_LEFT = text("given_up IS NOT NULL AND removed IS NULL")

blobs = Table(
    "blobs",
    metadata,
    Column("digest", Digest, primary_key=True),
    Column("tensor_digest", Digest, nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("stored", Moment, nullable=False),
    # A sweep marks what nothing refers to, gives it up after the grace period (from then on the
    # bytes may be gone), and notes when the store had removed them.
    Column("marked", Moment),
    Column("given_up", Moment),
    Column("removed", Moment),
    # Set for good by the erasure of a scene: the same bytes are not taken again.
    Column("erased", Moment),
    Index("ix_blobs_given_up", "given_up", sqlite_where=_LEFT, postgresql_where=_LEFT),
)

_KEPT = text("retired IS NULL")

versions = Table(
    "versions",
    metadata,
    Column("scene_id", ForeignKey("scenes.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", ForeignKey("blobs.digest"), nullable=False, index=True),
    Column("base", String(200), nullable=False),
    Column("base_fingerprint", Digest, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("metadata", Document, nullable=False),
    Column("created", Moment, nullable=False),
    Column("created_by", Person, nullable=False),
    Column("retired", Moment),
    # The version of the same scene that training began from.
    Column("parent", Integer),
    # Scene, person and prompt in lower case, for searches.
    Column("text", String(TEXT_LENGTH), nullable=False, server_default=""),
    # SHA-256 of the row's other columns: an edit by hand shows at the next read.
    Column("seal", Digest, nullable=False, server_default=""),
    UniqueConstraint("scene_id", "digest"),
    CheckConstraint("number > 0", name="number"),
    # Newest first, with all that a search filters by: it never reads rows that it passes over.
    Index(
        "ix_versions_listing", "created", "scene_id", "number", "base", "rank", "retired", "text"
    ),
    Index("ix_versions_servable", "scene_id", "number", sqlite_where=_KEPT, postgresql_where=_KEPT),
)

tags = Table(
    "tags",
    metadata,
    Column("scene_id", Identity, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("key", Name, primary_key=True),
    Column("value", String(VALUE_LENGTH), nullable=False),
    # The version's own, so that one index filters by tag and gives the order of a page.
    Column("created", Moment, nullable=False),
    ForeignKeyConstraint(["scene_id", "number"], ["versions.scene_id", "versions.number"]),
    Index("ix_tags_listing", "key", "value", "created", "scene_id", "number"),
)

metrics = Table(
    "metrics",
    metadata,
    Column("scene_id", Identity, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("name", Name, primary_key=True),
    Column("value", Double, nullable=False),
    ForeignKeyConstraint(["scene_id", "number"], ["versions.scene_id", "versions.number"]),
    Index(None, "name", "value"),
)

leases = Table(
    "leases",
    metadata,
    Column("digest", ForeignKey("blobs.digest"), primary_key=True),
    Column("holder", Person, primary_key=True),
    Column("taken", Moment, nullable=False),
    Column("expires", Moment, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("scene_id", Identity, primary_key=True, autoincrement=False),
    Column("name", Name, primary_key=True),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(["scene_id", "number"], ["versions.scene_id", "versions.number"]),
    Index(None, "scene_id", "number"),
    Index(None, "name"),
)

protected_aliases = Table(
    "protected_aliases",
    metadata,
    Column("scene_id", ForeignKey("scenes.id"), primary_key=True),
    Column("name", Name, primary_key=True),
    Column("protected", Moment, nullable=False),
    Column("protected_by", Person, nullable=False),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", Identity, primary_key=True),
    Column("scene_id", ForeignKey("scenes.id"), nullable=False),
    Column("alias", Name, nullable=False),
    Column("previous", Integer),
    Column("number", Integer, nullable=False),
    Column("action", String(20), nullable=False),
    # Set on rollbacks: the move that was taken back, with all moves after it.
    Column("undoes", ForeignKey("alias_moves.id")),
    Column("moved", Moment, nullable=False),
    Column("moved_by", Person, nullable=False),
    Index(None, "scene_id", "alias", "id"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Identity, primary_key=True),
    Column("at", Moment, nullable=False),
    Column("by", Person, nullable=False),
    Column("action", String(40), nullable=False),
    Column("scene", Name, nullable=False),
    Column("details", Document, nullable=False),
    Index(None, "scene", "id"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Identity, primary_key=True),
    Column("created", Moment, nullable=False),
    Column("event", String(40), nullable=False),
    Column("body", Document, nullable=False),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", Identity, primary_key=True),
    Column("address", String(ADDRESS_LENGTH), nullable=False, unique=True),
)

_OWED = text("delivered IS NULL")

deliveries = Table(
    "deliveries",
    metadata,
    Column("endpoint_id", ForeignKey("endpoints.id"), primary_key=True),
    Column("event_id", ForeignKey("outbox.id"), primary_key=True),
    Column("attempts", Integer, nullable=False),
    # When to try next and why the last try failed; set by whoever delivers.
    Column("due", Moment),
    Column("failure", String(FAILURE_LENGTH)),
    Column("delivered", Moment),
    Index(
        "ix_deliveries_owed", "endpoint_id", "event_id", sqlite_where=_OWED, postgresql_where=_OWED
    ),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("scene", Name, primary_key=True),
    Column("last_number", Integer, nullable=False),
    Column("erased", Moment, nullable=False),
    Column("erased_by", Person, nullable=False),
    Column("reason", String(500), nullable=False),
)
