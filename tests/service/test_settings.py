"""Settings: read once, refused in one sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from service.errors import InvalidSettings
from service.settings import PREFIX, Settings, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_defaults_are_loopback_and_the_embedded_base() -> None:
    """Without configuration the service is private and needs no download."""
    settings = load_settings()
    assert (settings.host, settings.port, settings.base) == ("127.0.0.1", 3000, "nano")
    assert settings.max_body_bytes == 32 * 2**20
    assert (settings.candidates, settings.steps, settings.sampler) == (4, None, None)


def test_a_variable_sets_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """REALFILL_<FIELD> is read."""
    monkeypatch.setenv("REALFILL_MAX_QUEUE", "3")
    assert load_settings().max_queue == 3


def test_a_lease_too_short_to_renew_is_refused() -> None:
    """A service that is busy for a moment must not lose its claims."""
    with pytest.raises(InvalidSettings, match="REALFILL_LEASE_S is 1: input should be greater"):
        load_settings(lease_s=1)


def test_an_unknown_setting_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable does not silently leave its default in force."""
    monkeypatch.setenv("REALFILL_MAXQUEUE", "3")
    with pytest.raises(InvalidSettings, match="REALFILL_MAXQUEUE: unset it, or use one of"):
        load_settings()


def test_a_value_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the variable and its value."""
    monkeypatch.setenv("REALFILL_PORT", "99999")
    with pytest.raises(InvalidSettings, match="REALFILL_PORT is '99999': input should be"):
        load_settings()


def test_a_reachable_host_is_refused_for_want_of_authentication() -> None:
    """Nobody exposes the service by accident."""
    with pytest.raises(InvalidSettings, match=r"0\.0\.0\.0 is reachable .* no authentication yet"):
        load_settings(host="0.0.0.0")


def test_a_reachable_host_is_allowed_when_asked_for() -> None:
    """An operator who has a proxy in front says so."""
    assert load_settings(host="0.0.0.0", allow_remote=True).host == "0.0.0.0"


def test_localhost_is_an_address() -> None:
    """The supervisor takes addresses only."""
    assert load_settings(host="localhost").host == "127.0.0.1"


def test_a_host_name_is_refused() -> None:
    """It might resolve to anything."""
    with pytest.raises(InvalidSettings, match="REALFILL_HOST is 'example'"):
        load_settings(host="example")


def test_more_default_candidates_than_samples_are_refused() -> None:
    """Every request that relies on the default would fail."""
    with pytest.raises(InvalidSettings, match="lower REALFILL_CANDIDATES"):
        load_settings(candidates=32)


def test_docs_list_every_setting_with_its_default(root: Path) -> None:
    """docs/engine.md has a row for each field; an empty default is one that is chosen later."""
    text = (root / "docs" / "engine.md").read_text()
    rows = re.findall(rf"^\| `{PREFIX}([A-Z_]+)` \| (?:`(.*)`)? ?\| .+ \|$", text, re.MULTILINE)
    defaults = {
        name.upper(): "" if field.default is None else str(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert dict(rows) == defaults
    assert len(rows) == len(defaults)
