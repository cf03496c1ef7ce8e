"""Alembic's entry: runs the migrations in the connection that `registry.database` hands over.

Without a connection it writes SQL for the dialect named in the attribute `dialect` instead.
"""

from __future__ import annotations

from alembic import context

from registry.schema import metadata

connection = context.config.attributes.get("connection")

if connection is None:
    context.configure(
        dialect_name=context.config.attributes["dialect"],
        target_metadata=metadata,
        literal_binds=True,
    )
else:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        compare_type=True,
    )

with context.begin_transaction():
    context.run_migrations()
