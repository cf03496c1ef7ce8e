"""Claims on what is served: the real road and registry, by a clock that is set by hand."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from fastapi.testclient import TestClient

from realfill.base import Base
from registry import Conflict, Lease, LeaseLost, NotFound, Registry, StorageUnavailable
from registry.address import DATABASE_FILE
from registry.blobs import open_directory
from registry.cli import cli
from registry.database import Database
from service.answer import Plan
from service.http import create_app
from service.road import Road
from service.settings import Settings
from tests.fakes import GreyEngine, encoded, hole, photo, road_of
from tests.registry.test_sweep import Clock
from tests.tiny import tiny_capsule

PLAN = Plan(seeds=(1,), steps=2, sampler="ddim", feather_px=2, seamless=False)
LEASE = timedelta(minutes=5)
NOW = timedelta(0)
PATIENCE_S = 60.0


class SlyRegistry(Registry):
    """A registry that can be away, or changed by somebody, when a claim is made."""

    away = False
    meanwhile: Callable[[], object] | None = None

    def hold(
        self, digests: Collection[str], holder: str, *, lasting: timedelta = LEASE
    ) -> list[Lease]:
        """See Keeper."""
        if self.meanwhile is not None:
            change, self.meanwhile = self.meanwhile, None
            change()
        if self.away:
            raise StorageUnavailable("The registry's database does not answer: try again.")
        return super().hold(digests, holder, lasting=lasting)


class Shop:
    """A road over a registry in a folder, the registry's clock, and a stranger's view of both."""

    def __init__(self, base: Base, folder: Path, host_bytes: int = 2**30) -> None:
        self.folder = folder
        self.clock = Clock()
        Registry.open(folder).close()
        database = Database(f"sqlite:///{folder / DATABASE_FILE}")
        self.registry = SlyRegistry(database, open_directory(folder), clock=self.clock)
        self.engine = GreyEngine()
        self.road = Road(base, self.registry, self.engine, None, host_bytes=host_bytes)

    def complete(self, reference: str) -> int:
        """The number of the version that a completion was made with."""
        image = torch.from_numpy(photo()).permute(2, 0, 1).contiguous()
        mask = torch.from_numpy(hole()) > 0
        return self.road.complete(reference, image, mask, PLAN).version.number

    @property
    def holders(self) -> list[tuple[str, str]]:
        """Digest and holder of every claim that has not expired."""
        return [(lease.digest, lease.holder) for lease in self.registry.leases()]


@pytest.fixture(scope="module")
def capsules(base: Base) -> list[bytes]:
    return [tiny_capsule(base, "tower", seed) for seed in range(2)]


@pytest.fixture
def shop(base: Base, capsules: list[bytes], tmp_path: Path) -> Iterator[Shop]:
    """A scene of two versions, of which the first is live."""
    shop = Shop(base, tmp_path / "registry")
    for capsule in capsules:
        shop.registry.publish(capsule)
    shop.registry.rollback("tower")
    yield shop
    shop.road.close()
    shop.registry.close()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The count of the warnings so far; other tests may have turned the logger to stderr."""
    monkeypatch.setattr(logging.getLogger("service"), "propagate", True)
    return lambda: sum(record.name == "service.leases" for record in caplog.records)


def _run(place: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(place), *words])


def _wait_for(fact: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.02)


def test_a_capsule_is_claimed_when_it_is_loaded(shop: Shop) -> None:
    """Once, and not again by the requests that find it in memory."""
    assert shop.holders == []
    shop.complete("tower")
    [lease] = shop.registry.leases()
    assert (lease.digest, lease.holder) == (shop.road.loaded[0], shop.road.leases.holder)
    assert lease.expires - lease.taken == LEASE
    shop.clock.pass_by(LEASE / 2)
    shop.complete("tower")
    assert shop.registry.leases() == [lease]


def test_two_roads_of_one_process_have_names_of_their_own(shop: Shop) -> None:
    """Else the one that ends would give up the other's claims."""
    other = Road(shop.road.base, shop.registry, GreyEngine(), None)
    assert other.leases.holder != shop.road.leases.holder


def test_a_served_version_is_not_retired_by_others(shop: Shop) -> None:
    """The refusal names the holder, though no alias points to the version; the end lifts it."""
    shop.complete("tower@2")
    with pytest.raises(Conflict, match=shop.road.leases.holder):
        shop.registry.retire("tower", 2)
    shop.road.close()
    assert shop.holders == []
    assert shop.registry.retire("tower", 2).retired is not None


def test_an_evicted_capsule_is_given_up(base: Base, capsules: list[bytes], tmp_path: Path) -> None:
    """Memory holds one capsule, and so does the claim."""
    shop = Shop(base, tmp_path / "registry", host_bytes=1)
    digests = [shop.registry.publish(capsule).digest for capsule in capsules]
    for number, digest in enumerate(digests, 1):
        assert shop.complete(f"tower@{number}") == number
        assert shop.holders == [(digest, shop.road.leases.holder)]


def test_claims_are_renewed(shop: Shop) -> None:
    """Twice four minutes pass, and the claim of five minutes still stands."""
    shop.complete("tower")
    for _ in range(2):
        shop.clock.pass_by(LEASE * 0.8)
        shop.road.leases.renew()
    assert [holder for _, holder in shop.holders] == [shop.road.leases.holder]
    assert len(shop.road.loaded) == 1


def test_an_erased_scene_leaves_memory_at_the_next_renewal(shop: Shop) -> None:
    """Only it: the claims of the others are renewed although they are taken all or none."""
    kept = shop.registry.publish(tiny_capsule(shop.road.base, "bridge", 7)).digest
    for reference in ("tower", "tower@2", "bridge"):
        shop.complete(reference)
    with pytest.raises(Conflict, match="served by"):
        shop.registry.erase("tower", reason="asked")
    shop.registry.erase("tower", reason="asked", force=True)
    assert len(shop.road.loaded) == 3
    shop.clock.pass_by(LEASE / 3)
    lost = set(shop.road.loaded) - {kept}
    shop.road.leases.renew()
    assert shop.road.loaded == [kept]
    # Not only the capsules: the weights on the device are those of the scene as well.
    assert set(shop.engine.forgotten) == lost
    [lease] = shop.registry.leases()
    assert (lease.digest, lease.taken) == (kept, shop.clock())
    with pytest.raises(NotFound, match="was erased"):
        shop.complete("tower")


def test_a_scene_erased_while_it_is_loaded_is_not_served(shop: Shop) -> None:
    """The claim comes after the bytes were read and before they are used."""
    shop.registry.meanwhile = lambda: shop.registry.erase("tower", reason="asked")
    with pytest.raises(LeaseLost, match="Resolve the scene again"):
        shop.complete("tower")
    assert shop.road.loaded == []
    with pytest.raises(NotFound, match="was erased"):
        shop.complete("tower")


def test_a_version_swept_after_its_claim_expired_is_not_served_on(shop: Shop) -> None:
    """A process that slept for an hour serves from memory until it renews, and not longer."""
    shop.complete("tower@2")
    reference = f"sha256:{shop.road.loaded[0]}"
    shop.clock.pass_by(LEASE * 12)
    shop.registry.retire("tower", 2)
    assert len(shop.registry.sweep(grace=NOW).removed) == 1
    assert shop.complete(reference) == 2
    shop.road.leases.renew()
    with pytest.raises(NotFound, match="removed by a sweep"):
        shop.complete(reference)


def test_a_replaced_version_is_let_go_when_nobody_asks_for_it(shop: Shop) -> None:
    """What an alias points to stays in memory, asked for or not."""
    shop.complete("tower@1")
    shop.complete("tower@2")
    shop.road.leases.renew()
    assert len(shop.road.loaded) == 2
    shop.road.leases.renew()
    assert shop.road.loaded == [shop.registry.resolve("tower@1").digest]
    assert shop.registry.retire("tower", 2).retired is not None


def test_a_replaced_version_that_is_asked_for_stays(shop: Shop) -> None:
    """Whoever pinned a number is not made to wait for its capsule again and again."""
    for _ in range(3):
        shop.complete("tower@2")
        shop.road.leases.renew()
    assert len(shop.road.loaded) == 1


def test_a_registry_that_is_away_does_not_end_serving(
    shop: Shop, warned: Callable[[], int]
) -> None:
    """One warning for as long as it is away; afterwards the claims are there again."""
    shop.complete("tower")
    shop.registry.away = True
    for _ in range(3):
        shop.clock.pass_by(LEASE)
        shop.road.leases.renew()
    assert shop.complete("tower") == 1
    assert shop.complete("tower@2") == 2
    assert (shop.holders, warned()) == ([], 1)
    shop.registry.away = False
    shop.road.leases.renew()
    assert len(shop.holders) == 2
    shop.registry.away = True
    shop.road.leases.renew()
    assert warned() == 2


def test_a_registry_that_is_only_read_is_served_from(
    shop: Shop, base: Base, warned: Callable[[], int]
) -> None:
    """Without claims, and with one warning however much is loaded, renewed or evicted."""
    address = f"sqlite:///file:{shop.folder / DATABASE_FILE}?mode=ro&uri=true"
    reader = Registry.open(shop.folder, database=address)
    shop.road = Road(base, reader, GreyEngine(), None, host_bytes=1)
    assert [shop.complete(f"tower@{number}") for number in (1, 2, 1)] == [1, 2, 1]
    shop.road.leases.renew()
    shop.road.close()
    assert (shop.holders, warned()) == ([], 1)
    reader.close()


def test_no_claim_is_taken_after_the_end(shop: Shop) -> None:
    """A request that was still on its way leaves none behind."""
    shop.complete("tower")
    shop.road.close()
    assert shop.complete("tower@2") == 2
    assert shop.holders == []


def _complete(client: TestClient, reference: str) -> int:
    files = {"image": encoded(photo()), "mask": encoded(hole())}
    return client.post(f"/v1/scenes/{reference}/complete", files=files).status_code


def test_the_running_service_claims_renews_and_lets_go(
    base: Base, capsules: list[bytes], tmp_path: Path
) -> None:
    """By its own thread: claimed, renewed, erased by the command, gone; no claim at the end."""
    road = road_of(base, tmp_path, lease_s=6.0)
    for capsule in capsules:
        road.registry.publish(capsule)
    road.registry.publish(tiny_capsule(base, "bridge", 7))
    with TestClient(create_app(road, Settings())) as client:
        assert _complete(client, "tower@1") == 200
        [lease] = road.registry.leases()
        refused = _run(tmp_path / "registry", "retire", "tower@1")
        assert (refused.exit_code, lease.holder in refused.stderr) == (2, True)
        road.registry.set_alias("tower", "first", 1)
        _wait_for(lambda: road.registry.leases()[0].taken > lease.taken)
        erased = _run(
            tmp_path / "registry", "erase", "tower", "--reason", "asked", "--force", "--yes"
        )
        assert erased.exit_code == 0, erased.stderr
        _wait_for(lambda: road.loaded == [])
        assert _complete(client, f"sha256:{lease.digest}") == 404
        assert _complete(client, "bridge") == 200
        assert [claim.holder for claim in road.registry.leases()] == [lease.holder]
    assert road.registry.leases() == []


def test_the_service_lets_go_of_what_it_shall_retire(
    base: Base, capsules: list[bytes], tmp_path: Path
) -> None:
    """Its own claim is not in the way; another's is, and so is an alias."""
    road = road_of(base, tmp_path)
    digests = [road.registry.publish(capsule).digest for capsule in capsules]
    with TestClient(create_app(road, Settings())) as client:
        for reference in ("tower@1", "tower@2"):
            assert _complete(client, reference) == 200
        road.registry.hold(digests, "lane-1")
        refused = client.delete("/v1/scenes/tower/versions/1")
        assert (refused.status_code, "served by lane-1:" in refused.text) == (409, True)
        road.registry.release("lane-1")
        assert client.delete("/v1/scenes/tower/versions/1").status_code == 200
        assert client.delete("/v1/scenes/tower/versions/2").status_code == 409
        assert road.loaded == [digests[1]]
