"""Scenes: layout, order, digests, and one sentence for everything that can be wrong."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from realfill.errors import InvalidScene
from realfill.scene import Scene, load_image, load_mask, load_scene, scene_from_paths


def _save(path: Path, size: tuple[int, int] = (32, 24), colour: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path)
    return path


def _save_mask(path: Path, size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, (4, 4, 12, 12))
    mask.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound scene of two references whose ground truth is known."""
    scene = tmp_path / "tower"
    _save(scene / "ref" / "b.png", colour=20)
    _save(scene / "ref" / "a.jpg", size=(40, 16), colour=200)
    _save(scene / "target" / "target.png")
    _save(scene / "target" / "gt.png", colour=129)
    _save_mask(scene / "target" / "mask.png")
    return scene


def test_load_scene_reads_the_realbench_layout(folder: Path) -> None:
    """References come in the order of their names, each of its own size."""
    scene = load_scene(folder)

    assert scene.name == "tower"
    assert [tuple(image.shape) for image in scene.references] == [(3, 16, 40), (3, 24, 32)]
    assert scene.references[1].mean().item() == pytest.approx(20 / 255)
    assert scene.target.shape == (3, 24, 32)
    assert scene.mask.sum() == 64
    assert scene.truth is not None
    assert scene.truth.mean().item() == pytest.approx(129 / 255)


def test_load_scene_keeps_a_digest_of_every_file(folder: Path) -> None:
    """SHA-256 of the files' bytes, by role and name."""
    scene = load_scene(folder, name="other")

    assert scene.name == "other"
    assert sorted(scene.digests) == [
        "mask/mask.png",
        "ref/a.jpg",
        "ref/b.png",
        "target/target.png",
        "truth/gt.png",
    ]
    expected = hashlib.sha256((folder / "ref" / "a.jpg").read_bytes()).hexdigest()
    assert scene.digests["ref/a.jpg"] == expected


def test_load_scene_ignores_what_is_no_photograph(folder: Path) -> None:
    """Hidden files, notes and folders beside the photographs are left alone."""
    (folder / "ref" / ".DS_Store").write_bytes(b"\0")
    (folder / "ref" / "._a.jpg").write_bytes(b"\0")
    (folder / "ref" / "notes.txt").write_text("at noon")
    (folder / "ref" / "old.png").mkdir()

    assert len(load_scene(folder).references) == 2


def test_load_scene_works_without_ground_truth(folder: Path) -> None:
    """The truth is optional."""
    (folder / "target" / "gt.png").unlink()

    assert load_scene(folder).truth is None


def test_scene_from_paths_equals_the_layout(folder: Path) -> None:
    """Explicit paths, given in any order, make the same scene."""
    by_layout = load_scene(folder)
    target = folder / "target"
    by_paths = scene_from_paths(
        "tower",
        [folder / "ref" / "b.png", folder / "ref" / "a.jpg"],
        target / "target.png",
        target / "mask.png",
        target / "gt.png",
    )

    assert by_paths.digests == by_layout.digests
    for first, second in zip(by_paths.references, by_layout.references, strict=True):
        assert torch.equal(first, second)


def test_scene_from_paths_tells_files_of_one_name_apart(tmp_path: Path, folder: Path) -> None:
    """Two cameras may both have written 1.png."""
    references = [
        _save(tmp_path / "x" / "1.png", colour=7),
        _save(tmp_path / "y" / "1.png", colour=9),
    ]
    target = folder / "target"
    scene = scene_from_paths("t", references, target / "target.png", target / "mask.png")

    assert len(scene.digests) == 4
    assert len(set(scene.digests.values())) == 4


def _without_references(folder: Path) -> None:
    for path in (folder / "ref").iterdir():
        path.unlink()


def _six_references(folder: Path) -> None:
    for number in range(4):
        _save(folder / "ref" / f"{number}.png")


def _mask_of_other_size(folder: Path) -> None:
    _save_mask(folder / "target" / "mask.png", (31, 24))


def _turned_mask(folder: Path) -> None:
    _save_mask(folder / "target" / "mask.png", (24, 32))


def _empty_mask(folder: Path) -> None:
    _save(folder / "target" / "mask.png", colour=0)


def _full_mask(folder: Path) -> None:
    _save(folder / "target" / "mask.png", colour=255)


def _truth_of_other_size(folder: Path) -> None:
    _save(folder / "target" / "gt.png", size=(64, 48))


def _no_target(folder: Path) -> None:
    (folder / "target" / "target.png").unlink()


def _two_masks(folder: Path) -> None:
    _save_mask(folder / "target" / "mask.webp")


def _no_ref_folder(folder: Path) -> None:
    _without_references(folder)
    (folder / "ref").rmdir()


def _torn_reference(folder: Path) -> None:
    path = folder / "ref" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


def _gif_in_disguise(folder: Path) -> None:
    stream = BytesIO()
    Image.new("P", (32, 32)).save(stream, "GIF")
    (folder / "ref" / "b.png").write_bytes(stream.getvalue())


@pytest.mark.parametrize(
    "spoil,message",
    [
        (_without_references, r"'tower' has no references: add 1 to 5 photographs"),
        (_six_references, r"'tower' has 6 references, at most 5 are used: keep the 5"),
        (_mask_of_other_size, r"mask\.png is 31x24 pixels, the target 32x24: export it"),
        (_turned_mask, r"24x32 pixels, the target 32x24: .*EXIF.*save both upright"),
        (_empty_mask, r"mask\.png marks no pixel as missing: white .*Paint the hole white"),
        (_full_mask, r"mask\.png marks every pixel as missing: white .*Invert it"),
        (_truth_of_other_size, r"ground truth is 64x48 pixels, the target 32x24"),
        (_no_target, r"holds no image called target\.\*: add target\.png"),
        (_two_masks, r"holds mask\.png and mask\.webp: keep one"),
        (_no_ref_folder, r"no folder .*ref: a scene holds ref/ .* and target/"),
        (_torn_reference, r"b\.png is damaged or incomplete .*again"),
        (_gif_in_disguise, r"b\.png is a GIF, whatever its name says"),
    ],
)
def test_load_scene_says_what_is_wrong(folder: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    """Each fault has one sentence that names the thing, the value and the remedy."""
    spoil(folder)
    with pytest.raises(InvalidScene, match=message):
        load_scene(folder)


def test_load_scene_says_which_folder_is_missing(tmp_path: Path) -> None:
    """A path that does not exist is named."""
    with pytest.raises(InvalidScene, match=r"no folder .*nowhere"):
        load_scene(tmp_path / "nowhere")


def test_load_image_says_which_file_is_missing(tmp_path: Path) -> None:
    """A file that does not exist is our error, not Python's."""
    with pytest.raises(InvalidScene, match=r"gone\.png cannot be read \(No such file"):
        load_image(tmp_path / "gone.png")


def test_load_mask_accepts_a_full_mask_on_request(folder: Path) -> None:
    """Scene variants have no known region."""
    path = _save(folder / "full.png", colour=255)

    assert load_mask(path, (24, 32), allow_full=True).min() == 1


def test_scene_checks_itself() -> None:
    """A scene that is put together by hand is held to the same rules."""
    image, mask = torch.zeros(3, 16, 16), torch.zeros(16, 16)
    mask[0, 0] = 1
    with pytest.raises(InvalidScene, match=r"no references"):
        Scene("t", (), image, mask, None, {})
    with pytest.raises(InvalidScene, match=r"The mask marks no pixel"):
        Scene("t", (image,), image, mask * 0, None, {})
    with pytest.raises(InvalidScene, match=r"The mask is 16x15"):
        Scene("t", (image,), image, mask[:15], None, {})


@pytest.mark.parametrize(
    "name,size,missing,truth",
    [
        ("flowerwoman", (512, 512), 0.7351, False),
        ("pumpkinlady2", (512, 512), 0.8220, False),
        ("london_bridge", (575, 768), 0.1752, True),
        ("london_bridge_outpaint", (575, 768), 0.5647, True),
        ("piazza_san_marco", (570, 768), 0.1899, True),
    ],
)
def test_shared_scenes_load(
    scenes_folder: Path, name: str, size: tuple[int, int], missing: float, truth: bool
) -> None:
    """Real photographs, RGBA targets and masks among them, have the known size and hole."""
    scene = load_scene(scenes_folder / name)

    assert len(scene.references) == 3
    assert scene.target.shape[-2:] == size
    assert scene.mask.mean().item() == pytest.approx(missing, abs=1e-4)
    assert (scene.truth is not None) == truth
    if scene.truth is not None:
        known = scene.mask == 0
        assert torch.equal(scene.truth[:, known], scene.target[:, known])
