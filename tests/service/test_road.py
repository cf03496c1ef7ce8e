"""The road of one completion, over a real registry and the tiny base."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from realfill.base import Base
from realfill.capsule import read_capsule, write_capsule
from realfill.complete.seam import Seam
from realfill.errors import AdapterMismatch, InvalidCapsule
from realfill.rank import Features, loftr, with_features
from realfill.rank.matchers import load_matcher
from registry import Registry
from registry.errors import CorruptObject, NotFound, SignatureRefused
from registry.signing import Guard, Policy, sign
from service.answer import Plan
from service.errors import Cancelled
from service.road import Road
from tests.fakes import GreyEngine, LightMatcher, road_of
from tests.registry.test_signing import write_keys
from tests.tiny import tiny_base, tiny_capsule

# The fake engine's fills are told apart by their grey, which seam removal would take away.
PLAN = Plan(seeds=(1, 2, 9), steps=2, sampler="ddim", feather_px=2, seamless=False)


@pytest.fixture(scope="module")
def tower(base: Base) -> bytes:
    return tiny_capsule(base, "tower", seed=1)


@pytest.fixture
def road(base: Base, tower: bytes, tmp_path: Path) -> Road:
    road = road_of(base, tmp_path)
    road.registry.publish(tower)
    return road


def test_candidates_come_best_first(road: Road, image: Tensor, mask: Tensor) -> None:
    """The brightest fill matches in most cells of the hole, for both references of the capsule."""
    answer = road.complete("tower", image, mask, PLAN)
    assert answer.ranked
    assert [candidate.seed for candidate in answer.candidates] == [9, 1, 2]
    best, dark = answer.candidates[0], answer.candidates[1]
    assert best.score == sum(best.per_reference or ()) > 0
    assert len(best.per_reference or ()) == 2
    assert dark.score == 0
    # Whatever matches lies where it belongs.
    assert best.agreement == answer.margin == pytest.approx(best.score)
    assert dark.agreement == 0


def test_the_best_picture_is_the_image_with_the_hole_filled(
    road: Road, image: Tensor, mask: Tensor
) -> None:
    """The hole takes the sample; beyond the feather every byte is the upload's."""
    picture = road.complete("tower", image, mask, PLAN).picture(0)
    assert picture.shape == image.shape
    assert (picture[:, mask] == 225).all()
    beyond = torch.ones_like(mask)
    beyond[11:29, 15:33] = False  # the hole of 12 px, and 2 px of feather and 1 of ramp around it
    assert torch.equal(picture[:, beyond], image[:, beyond])


def test_seams_are_removed_where_asked_for(road: Road, image: Tensor, mask: Tensor) -> None:
    """A fill of one grey takes the colours of its surroundings, and the answer says how long."""
    answer = road.complete("tower", image, mask, replace(PLAN, seamless=True))
    filled = answer.picture(0)[:, mask].float()
    around = image.float().mean((1, 2))[:, None]
    assert (filled.mean(1, keepdim=True) - around).abs().max() < 40
    assert "seam" in answer.timings_s
    assert "seam" not in road.complete("tower", image, mask, PLAN).timings_s


def test_what_is_made_while_a_gpu_draws_is_the_same(
    base: Base, tmp_path: Path, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what is made at once, in threads of its own; on a closed road, when it is asked for."""
    made_in: list[str] = []
    plan = replace(PLAN, seamless=True)

    def noting(*given: object) -> Seam:
        made_in.append(threading.current_thread().name)
        return Seam(seen)

    road = road_of(base, tmp_path)
    at_once = road.look_at(mask, plan)
    seen = at_once.seen
    monkeypatch.setattr("service.answer.Seam", noting)
    gpu = SimpleNamespace(device=torch.device("cuda"), size_px=base.size_px)
    monkeypatch.setattr(road, "base", gpu)
    beside = road.look_at(mask, plan)
    samples, target = torch.rand(2, 3, *seen.shape), torch.rand(3, *seen.shape)
    both = [hole.ahead() for hole in (at_once, beside)]
    closed = [ahead.seam.close(samples, target) for ahead in both if ahead.seam is not None]
    assert torch.equal(*closed)
    blended = [ahead.blend.of(samples, target) for ahead in both if ahead.blend is not None]
    assert torch.equal(*blended)
    road.close()
    late = road.look_at(mask, plan)
    assert len(made_in) == 1
    assert late.ahead() is late.ahead()
    assert made_in[0].startswith("realfill-ahead")
    assert made_in[1:] == [threading.current_thread().name]


@pytest.mark.parametrize("several", [False, True])
def test_a_matcher_of_many_cores_takes_turns_with_the_lane(
    base: Base, tower: bytes, tmp_path: Path, image: Tensor, mask: Tensor, several: bool
) -> None:
    """It looks at the references in one and ranks in another; one of a single core needs none."""
    engine = GreyEngine()
    road = road_of(base, tmp_path, engine)
    assert road.matcher is not None
    road.matcher.takes_all_cores = several
    road.registry.publish(tower)
    road.complete("tower", image, mask, PLAN)
    assert engine.turns == (2 if several else 0)


def test_onnx_runtime_takes_all_cores_and_torch_the_threads_own() -> None:
    """With one core there is nothing to take turns for."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert load_matcher("onnx:nano", "cpu").takes_all_cores
        assert not load_matcher("torch:nano", "cpu").takes_all_cores
        torch.set_num_threads(1)
        assert not load_matcher("onnx:nano", "cpu").takes_all_cores
    finally:
        torch.set_num_threads(before)


def test_a_deadline_leaves_time_for_what_comes_after_the_lane(
    road: Road, image: Tensor, mask: Tensor
) -> None:
    """As much as the last completions of as many candidates took."""
    assert isinstance(road.engine, GreyEngine)
    road.complete("tower", image, mask, replace(PLAN, deadline=1000.0))
    (job,) = road.engine.jobs
    assert (job.deadline, job.after.expected_s(3)) == (1000.0, 0.0)
    road.after_lane.learn(3, 0.25)
    assert job.after.expected_s(3) == job.after.least_s(3) == 0.25


def test_nothing_is_ranked_for_who_has_left(
    road: Road, image: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what comes from the lane too late, nor what waited for its turn meanwhile."""
    ranked: list[object] = []
    monkeypatch.setattr("service.road.rank_candidates", lambda *given: ranked.append(given))
    cancel = threading.Event()
    pending = road.begin(road.look_up("tower"), image, road.look_at(mask, PLAN), PLAN, cancel)
    sampled = pending.future.result()
    with ThreadPoolExecutor(1) as pool:
        with road._rank_lock:
            waiting = pool.submit(road.finish, pending, sampled)
            time.sleep(0.2)
            cancel.set()
        assert isinstance(waiting.exception(), Cancelled)
    with pytest.raises(Cancelled):
        road.finish(pending, sampled)
    assert ranked == []


def test_a_capsule_without_references_keeps_the_order_of_seeds(
    road: Road, base: Base, tower: bytes, image: Tensor, mask: Tensor
) -> None:
    """There is nothing to rank by, and the answer says so."""
    capsule = read_capsule(tower, base)
    bare = type(capsule)(
        header=capsule.header,
        adapter=capsule.adapter,
        text_adapter=capsule.text_adapter,
        prompt_embedding=capsule.prompt_embedding,
        extras={},
    )
    road.registry.publish(write_capsule(bare), scene="bare")
    answer = road.complete("bare", image, mask, PLAN)
    assert not answer.ranked
    assert [candidate.seed for candidate in answer.candidates] == [1, 2, 9]
    assert answer.margin is None


def test_the_digest_is_pinned_and_goes_to_the_lane(road: Road, image: Tensor, mask: Tensor) -> None:
    """What the registry resolved is what the engine fuses and what the answer names."""
    answer = road.complete("tower@1", image, mask, PLAN)
    assert isinstance(road.engine, GreyEngine)
    assert road.engine.jobs[-1].digest == answer.version.digest
    assert road.complete(f"sha256:{answer.version.digest}", image, mask, PLAN).version.number == 1


def test_an_unknown_scene_is_not_found(road: Road, image: Tensor, mask: Tensor) -> None:
    """The registry's own error, before anything is sampled."""
    with pytest.raises(NotFound, match="bridge"):
        road.complete("bridge", image, mask, PLAN)


def test_a_flipped_byte_on_disk_is_found_before_it_is_used(
    road: Road, image: Tensor, mask: Tensor, tmp_path: Path
) -> None:
    """The digest is checked on every read of the store."""
    digest = road.registry.resolve("tower").digest
    [blob] = [path for path in (tmp_path / "registry").rglob("*") if path.name.startswith(digest)]
    stored = bytearray(blob.read_bytes())
    stored[-5] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(stored)
    with pytest.raises(CorruptObject, match=digest):
        road.complete("tower", image, mask, PLAN)


def test_a_capsule_for_another_base_is_refused(road: Road, image: Tensor, mask: Tensor) -> None:
    """A version published past the service is still checked against the base."""
    road.registry.publish(tiny_capsule(tiny_base(seed=1), "abroad"))
    with pytest.raises(AdapterMismatch):
        road.complete("abroad", image, mask, PLAN)


def test_references_that_are_no_pictures_are_refused(road: Road, base: Base, tower: bytes) -> None:
    """They would fail later, in the ranking of somebody's request."""
    capsule = read_capsule(tower, base)
    capsule.extras["references.0"] = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(InvalidCapsule, match=r"references\.0 is torch.uint8 \[3, 4, 4\]"):
        road.check(write_capsule(capsule))


def test_capsules_are_read_once_and_the_oldest_goes(
    base: Base, image: Tensor, mask: Tensor, tmp_path: Path
) -> None:
    """Memory holds so many capsules; one that is in it needs no store."""
    road = road_of(base, tmp_path, host_bytes=1)
    for seed, scene in enumerate(("tower", "bridge")):
        road.registry.publish(tiny_capsule(base, scene, seed))
    road.complete("bridge", image, mask, PLAN)
    road.complete("tower", image, mask, PLAN)
    for blob in (tmp_path / "registry").rglob("*"):
        if blob.is_file() and "registry.db" not in blob.name:
            blob.unlink()
    assert road.complete("tower", image, mask, PLAN).version.scene == "tower"
    with pytest.raises(CorruptObject):
        road.complete("bridge", image, mask, PLAN)


def test_work_that_nobody_waits_for_does_not_begin(road: Road, image: Tensor, mask: Tensor) -> None:
    """A request that timed out before its turn costs the lane nothing."""
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        road.complete("tower", image, mask, PLAN, cancel)
    assert isinstance(road.engine, GreyEngine)
    assert road.engine.jobs == []


def test_the_registrys_cache_is_a_tier(base: Base, tower: bytes, tmp_path: Path) -> None:
    """Beside the capsules in memory, where there is one."""
    plain = road_of(base, tmp_path)
    plain.registry.publish(tower)
    assert set(plain.tiers()) == {"host"}
    cached = Registry.open(tmp_path / "registry", cache=tmp_path / "cache")
    road = Road(base, cached, GreyEngine(), None)
    road.look_up("tower")
    disk, host = road.tiers()["disk"], road.tiers()["host"]
    assert (disk.entries, disk.misses, disk.hits) == (1, 1, 0)
    assert disk.held_bytes == host.held_bytes == len(tower)


def test_an_unsigned_capsule_is_refused_where_signatures_are_required(
    base: Base, tower: bytes, tmp_path: Path, image: Tensor, mask: Tensor
) -> None:
    """Before a tensor of it is read; once it is signed, it is served."""
    private, public = write_keys(tmp_path, "ada")
    registry = road_of(base, tmp_path).registry
    registry.publish(tower)
    guarded = Road(base, registry, GreyEngine(), None, guard=Guard(Policy.REQUIRE, [public]))
    with pytest.raises(SignatureRefused, match="is not signed"):
        guarded.complete("tower", image, mask, PLAN)
    sign(registry, "tower", private)
    assert guarded.complete("tower", image, mask, PLAN).version.number == 1


def test_features_that_the_capsule_keeps_are_not_made_again(base: Base, tmp_path: Path) -> None:
    """Kept by the matcher that serves, they are used; of another matcher, they are not."""
    matcher, other = loftr("nano"), LightMatcher()
    plain = read_capsule(tiny_capsule(base, "tower", seed=1), base)
    kept = read_capsule(write_capsule(with_features(plain, matcher)), base)
    made: list[int] = []

    def counted(images: Tensor) -> Features:
        made.append(len(images))
        return type(matcher).features(matcher, images)

    matcher.features = counted  # type: ignore[method-assign]
    road = road_of(base, tmp_path, matcher=matcher)
    from_capsule, anew = road.prepare(kept), road.prepare(plain)
    assert made == [1, 1]
    assert from_capsule is not None
    assert anew is not None
    for one, two in zip(from_capsule.features, anew.features, strict=True):
        assert torch.equal(one.tokens, two.tokens)
    assert from_capsule.sizes == anew.sizes == ((32, 48), (32, 48))
    assert road_of(base, tmp_path / "other", matcher=other).prepare(kept) is not None
    assert made == [1, 1]
