"""Tests of searches: each condition, and pages that meet."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry import InvalidReference, Query, Registry
from registry.database import Database
from tests.registry.capsules import MemoryObjects, capsule

START = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Registry]:
    """Four versions, an hour apart: tower 1 to 3 and bridge 1."""
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    database.prepare()
    moments = iter(START + timedelta(hours=hour) for hour in range(99))
    registry = Registry(database, MemoryObjects(), clock=lambda: next(moments))
    registry.publish(capsule(seed=0), by="ada", tags={"site": "north", "kind": "night"})
    registry.publish(capsule(seed=1), by="bob", metrics={"psnr": 25}, tags={"site": "north"})
    registry.publish(capsule(seed=2, prompt="a photo of the Old Mill"), by="bob", alias="next")
    registry.publish(capsule(scene="bridge", seed=3, base="sd2"), by="ada", tags={"site": "south"})
    yield registry
    registry.close()


def found(registry: Registry, query: Query) -> list[str]:
    """References of what a query finds."""
    return [version.reference for version in registry.search(query).versions]


@pytest.mark.parametrize(
    ("query", "references"),
    [
        (Query(), ["bridge@1", "tower@3", "tower@2", "tower@1"]),
        (Query(scene="tower"), ["tower@3", "tower@2", "tower@1"]),
        (Query(tags={"site": "north"}), ["tower@2", "tower@1"]),
        (Query(tags={"site": "north", "kind": "night"}), ["tower@1"]),
        (Query(tags={"site": None}), ["bridge@1", "tower@2", "tower@1"]),
        (Query(tags={"site": "nor"}), []),
        (Query(base="sd2"), ["bridge@1"]),
        (Query(base="5c" * 32, text="BOB"), ["tower@3", "tower@2"]),
        (Query(rank=3), []),
        (Query(metrics=["psnr>=25"]), ["tower@2"]),
        (Query(metrics=["psnr > 25"]), []),
        (Query(metrics=["steps=10", "psnr<26"]), ["tower@2"]),
        (Query(since=START + timedelta(hours=2)), ["bridge@1", "tower@3"]),
        (Query(until=START + timedelta(hours=1)), ["tower@1"]),
        (Query(alias="live"), ["bridge@1", "tower@2"]),
        (Query(alias="next"), ["tower@3"]),
        (Query(text="old mill"), ["tower@3"]),
        (Query(text="100%"), []),
        (Query(text="_"), []),
    ],
)
def test_query_finds_what_meets_it(shop: Registry, query: Query, references: list[str]) -> None:
    """Every condition counts, newest first."""
    assert found(shop, query) == references


def test_found_versions_show_their_aliases(shop: Registry) -> None:
    """Aliases, tags and metrics are in every answer."""
    newest, *_, second, first = shop.search().versions
    assert (newest.aliases, second.aliases, first.aliases) == (("live",), ("live",), ())
    assert first.tags == {"kind": "night", "site": "north"}
    assert second.metrics == {"psnr": 25.0, "steps": 10.0}


def test_retired_versions_are_found_when_asked_for(shop: Registry) -> None:
    """They are left out otherwise."""
    shop.retire("tower", 1)
    assert found(shop, Query(tags={"site": "north"})) == ["tower@2"]
    assert found(shop, Query(tags={"site": "north"}, retired=True)) == ["tower@2", "tower@1"]


@pytest.mark.parametrize("query", [Query(), Query(tags={"site": "north"}), Query(scene="tower")])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_pages_meet(shop: Registry, query: Query, limit: int) -> None:
    """Page by page gives what one page gives, though a version is published in between."""
    whole = found(shop, query)
    page = shop.search(query, limit=limit)
    shop.publish(capsule(seed=9), tags={"site": "north"})
    seen = list(page.versions)
    while page.after is not None:
        page = shop.search(query, after=page.after, limit=limit)
        seen += page.versions
    assert [version.reference for version in seen] == whole


def test_versions_of_one_moment_are_all_shown(tmp_path: Path) -> None:
    """Equal times are told apart by scene and number."""
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    database.prepare()
    registry = Registry(database, MemoryObjects(), clock=lambda: START)
    for seed in range(5):
        registry.publish(capsule(scene=f"scene-{seed % 2}", seed=seed))
    page, seen = registry.search(limit=2), []
    seen += page.versions
    while page.after:
        page = registry.search(after=page.after, limit=2)
        seen += page.versions
    assert len({version.reference for version in seen}) == len(seen) == 5


def test_tag_that_is_removed_finds_nothing(shop: Registry) -> None:
    """None removes a tag, another value replaces it."""
    shop.tag("tower", 1, {"kind": None, "site": "south"})
    assert shop.resolve("tower@1").tags == {"site": "south"}
    assert found(shop, Query(tags={"kind": None})) == []
    assert found(shop, Query(tags={"site": "south"})) == ["bridge@1", "tower@1"]


def test_metric_can_be_measured_later(shop: Registry) -> None:
    """A new value replaces the old one."""
    shop.measure("tower", 1, {"psnr": 20})
    assert shop.measure("tower", 1, {"psnr": 30}).metrics["psnr"] == 30
    assert found(shop, Query(metrics=["psnr>=25"])) == ["tower@2", "tower@1"]


@pytest.mark.parametrize("after", ["", "1", "1-2", "x-1-1", f"{10**18 - 1}-1-1", "1-1-1 "])
def test_malformed_page_is_refused(shop: Registry, after: str) -> None:
    """A page that was not given out is no place to go on from."""
    with pytest.raises(InvalidReference, match="pass the text that the page before it gave"):
        shop.search(after=after)


@pytest.mark.parametrize("text", ["psnr", "psnr>>1", "psnr>=x", "Psnr>1", "psnr>=1 2"])
def test_malformed_comparison_is_refused(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(InvalidReference, match="write it like psnr>=20"):
        Query(metrics=[text])


def test_malformed_conditions_are_refused(shop: Registry) -> None:
    """Names follow the rules, times have zones, pages have sizes."""
    for conditions in ({"scene": "A"}, {"alias": "3"}, {"tags": {"A": "b"}}):
        with pytest.raises(InvalidReference, match="is not allowed"):
            Query(**conditions)  # type: ignore[arg-type]
    for said in ({"text": "a\0b"}, {"base": "a\0b"}, {"tags": {"site": "a\0b"}}):
        with pytest.raises(InvalidReference, match="the character NUL"):
            Query(**said)  # type: ignore[arg-type]
    with pytest.raises(InvalidReference, match="has no zone"):
        Query(since=datetime(2026, 5, 4))
    with pytest.raises(InvalidReference, match="use 1 to 10000"):
        shop.search(limit=0)


@pytest.mark.parametrize("tags", [{"Site": "a"}, {"site": ""}, {"site": "a\nb"}, {"s": "x" * 201}])
def test_malformed_tag_is_refused(shop: Registry, tags: dict[str, str]) -> None:
    """Nothing is stored of it."""
    with pytest.raises(InvalidReference, match="is not allowed"):
        shop.publish(capsule(seed=7), tags=tags)
    with pytest.raises(InvalidReference, match="only finite numbers"):
        shop.measure("tower", 1, {"psnr": float("nan")})
    assert len(shop.search().versions) == 4
