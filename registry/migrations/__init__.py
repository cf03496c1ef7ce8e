"""Alembic migrations, packaged so that an installed registry can build its own tables."""
