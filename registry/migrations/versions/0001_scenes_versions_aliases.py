"""Scenes, versions, blobs, aliases and their moves, audit and outbox."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out and not imported from schema.py: a revision never changes, the schema does.
IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Build the first tables."""
    op.create_table(
        "scenes",
        sa.Column("id", IDENTITY, nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_scenes"),
        sa.UniqueConstraint("name", name="uq_scenes_name"),
        sa.CheckConstraint("last_number >= 0", name=op.f("ck_scenes_last_number")),
    )
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("tensor_digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("stored", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_blobs"),
    )
    op.create_index("ix_blobs_tensor_digest", "blobs", ["tensor_digest"])
    _create_versions()
    _create_aliases()
    _create_events()


def _create_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("scene_id", IDENTITY, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("base", sa.String(200), nullable=False),
        sa.Column("base_fingerprint", sa.String(64), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("metadata", DOCUMENT, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("retired", MOMENT),
        sa.PrimaryKeyConstraint("scene_id", "number", name="pk_versions"),
        sa.UniqueConstraint("scene_id", "digest", name="uq_versions_scene_id_digest"),
        sa.ForeignKeyConstraint(["scene_id"], ["scenes.id"], name="fk_versions_scene_id_scenes"),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name="fk_versions_digest_blobs"),
        sa.CheckConstraint("number > 0", name=op.f("ck_versions_number")),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])


def _create_aliases() -> None:
    op.create_table(
        "aliases",
        sa.Column("scene_id", IDENTITY, autoincrement=False, nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("scene_id", "name", name="pk_aliases"),
        sa.ForeignKeyConstraint(
            ["scene_id", "number"],
            ["versions.scene_id", "versions.number"],
            name="fk_aliases_scene_id_number_versions",
        ),
    )
    op.create_index("ix_aliases_scene_id_number", "aliases", ["scene_id", "number"])
    op.create_table(
        "alias_moves",
        sa.Column("id", IDENTITY, nullable=False),
        sa.Column("scene_id", IDENTITY, nullable=False),
        sa.Column("alias", sa.String(63), nullable=False),
        sa.Column("previous", sa.Integer()),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("undoes", IDENTITY),
        sa.Column("moved", MOMENT, nullable=False),
        sa.Column("moved_by", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alias_moves"),
        sa.ForeignKeyConstraint(["scene_id"], ["scenes.id"], name="fk_alias_moves_scene_id_scenes"),
        sa.ForeignKeyConstraint(
            ["undoes"], ["alias_moves.id"], name="fk_alias_moves_undoes_alias_moves"
        ),
    )
    op.create_index(
        "ix_alias_moves_scene_id_alias_id", "alias_moves", ["scene_id", "alias", "id"]
    )


def _create_events() -> None:
    op.create_table(
        "audit",
        sa.Column("id", IDENTITY, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("by", sa.String(200), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("scene", sa.String(63), nullable=False),
        sa.Column("details", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_scene_id", "audit", ["scene", "id"])
    op.create_table(
        "outbox",
        sa.Column("id", IDENTITY, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("body", DOCUMENT, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("delivered", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
    )
    op.create_index("ix_outbox_delivered_id", "outbox", ["delivered", "id"])


def downgrade() -> None:
    """Drop every table, with all that it holds."""
    for table in ("outbox", "audit", "alias_moves", "aliases", "versions", "blobs", "scenes"):
        op.drop_table(table)
