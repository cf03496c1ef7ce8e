"""The tables. Rows of versions, alias_moves, audit and outbox are never rewritten in place.

    scenes ─┬─ versions ── blobs      immutable numbers, bytes shared by digest
            ├─ aliases                where each name points now
            └─ alias_moves            every step it took: rollback reads them
    audit, outbox                     one row each per change, in the change's transaction

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
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

# The revision that this code reads and writes: the newest file of migrations/versions.
REVISION = "0001"

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

scenes = Table(
    "scenes",
    metadata,
    Column("id", Identity, primary_key=True),
    Column("name", Name, nullable=False, unique=True),
    Column("last_number", Integer, nullable=False),
    Column("created", Moment, nullable=False),
    CheckConstraint("last_number >= 0", name="last_number"),
)

blobs = Table(
    "blobs",
    metadata,
    Column("digest", Digest, primary_key=True),
    Column("tensor_digest", Digest, nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("stored", Moment, nullable=False),
)

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
    UniqueConstraint("scene_id", "digest"),
    CheckConstraint("number > 0", name="number"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("scene_id", Identity, primary_key=True, autoincrement=False),
    Column("name", Name, primary_key=True),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(["scene_id", "number"], ["versions.scene_id", "versions.number"]),
    Index(None, "scene_id", "number"),
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
    Column("attempts", Integer, nullable=False),
    Column("delivered", Moment),
    Index(None, "delivered", "id"),
)
