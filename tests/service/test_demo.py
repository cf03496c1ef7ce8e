"""The demo's command; its whole road is run by `make demo`."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from service.cli import demo


def test_a_registry_that_cannot_be_opened_is_named_with_the_remedy(tmp_path: Path) -> None:
    """One sentence before anything is trained, and nothing is removed."""
    database = tmp_path / "registry" / "registry.db"
    database.parent.mkdir()
    database.write_bytes(b"no database" * 100)
    outcome = CliRunner().invoke(demo, ["--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "Or remove" in outcome.output
    assert database.read_bytes() == b"no database" * 100
