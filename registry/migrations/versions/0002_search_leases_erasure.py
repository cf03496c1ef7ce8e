"""Search, tags and metrics; seals of rows; leases, sweeping and erasure; protected aliases."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC
from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Written out and not imported from schema.py: a revision never changes, the schema does.
IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True)
BLOB_MOMENTS = ("marked", "given_up", "removed", "erased")
BATCH = 1000


def upgrade() -> None:
    """Add columns and tables, then fill in what follows from the rows that are there."""
    for name in BLOB_MOMENTS:
        op.add_column("blobs", sa.Column(name, MOMENT))
    op.add_column("versions", sa.Column("parent", sa.Integer()))
    op.add_column(
        "versions", sa.Column("text", sa.String(300), nullable=False, server_default="")
    )
    op.add_column("versions", sa.Column("seal", sa.String(64), nullable=False, server_default=""))
    op.add_column("outbox", sa.Column("due", MOMENT))
    op.add_column("outbox", sa.Column("failure", sa.String(500)))
    if not context.is_offline_mode():
        _fill_in()
    _create_indexes()
    _create_labels()
    _create_claims()


def _create_indexes() -> None:
    left = sa.text("given_up IS NOT NULL AND removed IS NULL")
    op.create_index(
        "ix_blobs_given_up", "blobs", ["given_up"], sqlite_where=left, postgresql_where=left
    )
    listing = ["created", "scene_id", "number", "base", "rank", "retired", "text"]
    op.create_index("ix_versions_listing", "versions", listing)
    kept = sa.text("retired IS NULL")
    op.create_index(
        "ix_versions_servable",
        "versions",
        ["scene_id", "number"],
        sqlite_where=kept,
        postgresql_where=kept,
    )
    op.create_index("ix_aliases_name", "aliases", ["name"])


def _create_labels() -> None:
    op.create_table(
        "tags",
        sa.Column("scene_id", IDENTITY, autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key", sa.String(63), nullable=False),
        sa.Column("value", sa.String(200), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("scene_id", "number", "key", name="pk_tags"),
        sa.ForeignKeyConstraint(
            ["scene_id", "number"],
            ["versions.scene_id", "versions.number"],
            name="fk_tags_scene_id_number_versions",
        ),
    )
    op.create_index(
        "ix_tags_listing", "tags", ["key", "value", "created", "scene_id", "number"]
    )
    op.create_table(
        "metrics",
        sa.Column("scene_id", IDENTITY, autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("scene_id", "number", "name", name="pk_metrics"),
        sa.ForeignKeyConstraint(
            ["scene_id", "number"],
            ["versions.scene_id", "versions.number"],
            name="fk_metrics_scene_id_number_versions",
        ),
    )
    op.create_index("ix_metrics_name_value", "metrics", ["name", "value"])


def _create_claims() -> None:
    op.create_table(
        "leases",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("holder", sa.String(200), nullable=False),
        sa.Column("taken", MOMENT, nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("digest", "holder", name="pk_leases"),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name="fk_leases_digest_blobs"),
    )
    op.create_table(
        "protected_aliases",
        sa.Column("scene_id", IDENTITY, nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("protected", MOMENT, nullable=False),
        sa.Column("protected_by", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("scene_id", "name", name="pk_protected_aliases"),
        sa.ForeignKeyConstraint(
            ["scene_id"], ["scenes.id"], name="fk_protected_aliases_scene_id_scenes"
        ),
    )
    op.create_table(
        "tombstones",
        sa.Column("scene", sa.String(63), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("erased", MOMENT, nullable=False),
        sa.Column("erased_by", sa.String(200), nullable=False),
        sa.Column("reason", sa.String(500), nullable=False),
        sa.PrimaryKeyConstraint("scene", name="pk_tombstones"),
    )


def _fill_in() -> None:
    """Texts and seals of the versions that are there, a page at a time."""
    connection = op.get_bind()
    page = sa.text(
        "SELECT v.scene_id, v.number, s.name AS scene, v.digest, v.base, v.base_fingerprint, "
        "v.rank, v.created, v.created_by, v.retired, v.metadata FROM versions v "
        "JOIN scenes s ON s.id = v.scene_id WHERE v.scene_id > :scene_id "
        "OR (v.scene_id = :scene_id AND v.number > :number) "
        "ORDER BY v.scene_id, v.number LIMIT :limit"
    ).columns(created=MOMENT, retired=MOMENT, metadata=sa.JSON())
    change = sa.text(
        "UPDATE versions SET text = :text, seal = :seal "
        "WHERE scene_id = :scene_id AND number = :number"
    )
    last = {"scene_id": 0, "number": 0}
    while rows := connection.execute(page, {**last, "limit": BATCH}).all():
        for row in rows:
            words = f"{row.scene} {row.created_by} {row.metadata.get('realfill.prompt', '')}"
            last = {"scene_id": row.scene_id, "number": row.number}
            new = {"text": words.casefold()[:300], "seal": _seal(row)}
            connection.execute(change, {**last, **new})


def _seal(row: sa.Row[Any]) -> str:
    """As registry/seals.py had it when this revision was written."""
    moments = [
        moment and (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
        for moment in (row.created, row.retired)
    ]
    fields = [row.scene, row.number, row.digest, row.base, row.base_fingerprint, row.rank, None]
    fields += [moment and moment.isoformat() for moment in moments]
    fields.append(row.created_by)
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def downgrade() -> None:
    """Drop what was added: tags, metrics, leases, protections and tombstones are lost."""
    for table in ("tombstones", "protected_aliases", "leases", "metrics", "tags"):
        op.drop_table(table)
    op.drop_index("ix_aliases_name", "aliases")
    op.drop_index("ix_versions_servable", "versions")
    op.drop_index("ix_versions_listing", "versions")
    op.drop_index("ix_blobs_given_up", "blobs")
    for table, names in {
        "outbox": ("failure", "due"),
        "versions": ("seal", "text", "parent"),
        "blobs": BLOB_MOMENTS,
    }.items():
        for name in names:
            op.drop_column(table, name)
