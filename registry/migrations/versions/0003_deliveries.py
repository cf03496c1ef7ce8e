"""Deliveries to each webhook endpoint, where the outbox had one state for all of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Written out and not imported from schema.py: a revision never changes, the schema does.
IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True)

# The endpoints of revision 0002 have no names: one without a name stands for them, and the first
# that are named inherit from it. Where nothing was ever sent, there were none.
CARRY_ENDPOINT = """
    INSERT INTO endpoints (address)
    SELECT '' WHERE EXISTS (SELECT 1 FROM outbox WHERE attempts > 0)
"""
CARRY_DELIVERIES = """
    INSERT INTO deliveries (endpoint_id, event_id, attempts, due, failure, delivered)
    SELECT e.id, o.id, o.attempts, o.due, o.failure, o.delivered
    FROM endpoints e CROSS JOIN outbox o
"""
# An event is delivered when nobody waits for it, and that is so of those that nobody is owed.
RETURN_DELIVERIES = """
    UPDATE outbox SET
        attempts = COALESCE(
            (SELECT min(attempts) FROM deliveries d
             WHERE d.event_id = outbox.id AND d.delivered IS NULL),
            (SELECT max(attempts) FROM deliveries d WHERE d.event_id = outbox.id),
            0),
        due = (SELECT min(due) FROM deliveries d
               WHERE d.event_id = outbox.id AND d.delivered IS NULL),
        failure = (SELECT max(failure) FROM deliveries d
                   WHERE d.event_id = outbox.id AND d.delivered IS NULL),
        delivered = CASE WHEN NOT EXISTS (
                SELECT 1 FROM deliveries d
                WHERE d.event_id = outbox.id AND d.delivered IS NULL)
            THEN COALESCE(
                (SELECT max(delivered) FROM deliveries d WHERE d.event_id = outbox.id), created)
            END
    WHERE EXISTS (SELECT 1 FROM endpoints)
"""


def upgrade() -> None:
    """Add the tables, move into them what the outbox knew, and drop it there."""
    op.create_table(
        "endpoints",
        sa.Column("id", IDENTITY, nullable=False),
        sa.Column("address", sa.String(500), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_endpoints"),
        sa.UniqueConstraint("address", name="uq_endpoints_address"),
    )
    op.create_table(
        "deliveries",
        sa.Column("endpoint_id", IDENTITY, nullable=False),
        sa.Column("event_id", IDENTITY, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due", MOMENT),
        sa.Column("failure", sa.String(500)),
        sa.Column("delivered", MOMENT),
        sa.PrimaryKeyConstraint("endpoint_id", "event_id", name="pk_deliveries"),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["endpoints.id"], name="fk_deliveries_endpoint_id_endpoints"
        ),
        sa.ForeignKeyConstraint(["event_id"], ["outbox.id"], name="fk_deliveries_event_id_outbox"),
    )
    owed = sa.text("delivered IS NULL")
    op.create_index(
        "ix_deliveries_owed",
        "deliveries",
        ["endpoint_id", "event_id"],
        sqlite_where=owed,
        postgresql_where=owed,
    )
    op.execute(CARRY_ENDPOINT)
    op.execute(CARRY_DELIVERIES)
    op.drop_index("ix_outbox_delivered_id", "outbox")
    for name in ("delivered", "failure", "due", "attempts"):
        op.drop_column("outbox", name)


def downgrade() -> None:
    """Give each event one state again; which endpoint took it is lost."""
    attempts = sa.Column("attempts", sa.Integer(), nullable=False, server_default="0")
    op.add_column("outbox", attempts)
    op.add_column("outbox", sa.Column("due", MOMENT))
    op.add_column("outbox", sa.Column("failure", sa.String(500)))
    op.add_column("outbox", sa.Column("delivered", MOMENT))
    op.execute(RETURN_DELIVERIES)
    op.create_index("ix_outbox_delivered_id", "outbox", ["delivered", "id"])
    op.drop_index("ix_deliveries_owed", "deliveries")
    op.drop_table("deliveries")
    op.drop_table("endpoints")
