"""Scenes: the photographs of one place, read and checked.

A scene is a folder in the layout of RealBench, `ref/*` and `target/{target,mask[,gt]}.*`, or a list
of explicit paths. Everything that is read here may come from a stranger.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from realfill.errors import InvalidScene
from realfill.photographs import MAX_PIXELS, decode_bytes, decode_image, decode_mask

MAX_REFERENCES = 5
# Files that are taken for photographs; whether their format is allowed, their content decides.
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff"}
    | {".gif", ".bmp", ".heic", ".heif", ".avif"}
)
# The registry's rule, which knows nothing of this package.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Scene:
    """One place.

    Attributes:
        name: What the place is called.
        references: 1 to 5 photographs of the place, in [0, 1], each of its own size. [3, H, W]
        target: The image to complete, in [0, 1]. [3, H, W]
        mask: 1 where the target's pixels are missing, else 0. [H, W]
        truth: What the target should become, where that is known. [3, H, W]
        digests: SHA-256 of every file, by role and name: `ref/0.jpg`, `mask/mask.png`.
    """

    name: str
    references: tuple[Tensor, ...]
    target: Tensor
    mask: Tensor
    truth: Tensor | None
    digests: dict[str, str]

    def __post_init__(self) -> None:
        _check_reference_count(self.name, len(self.references))
        size = self.target.shape[-2:]
        _check_mask("The mask", self.mask, size, allow_full=False)
        if self.truth is not None and self.truth.shape[-2:] != size:
            raise InvalidScene(_wrong_size("The ground truth", self.truth, size))


def load_image(
    source: Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, label: str | None = None
) -> Tensor:
    """Read a photograph as it is meant to be seen.

    EXIF orientation is applied, colours are converted to sRGB, transparency is laid over white,
    16-bit grey keeps its precision. PNG, JPEG, WebP and TIFF are known by content, not by name.

    Args:
        source: A file, its bytes, or a stream of them.
        max_pixels: Larger images are refused before they are decoded.
        label: What messages call the image; the file's name unless given.

    Returns:
        Pixels in [0, 1]. [3, H, W]

    Raises:
        InvalidScene: Not an allowed image, damaged, animated, too large or too small.
    """
    encoded, name = _read(source, "The image")
    return decode_image(encoded, label or name, max_pixels)


def load_bytes(
    source: Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, label: str | None = None
) -> Tensor:
    """Read a photograph as ``load_image`` does, to 8 bits: a quarter of the memory.

    Returns:
        The nearest 8-bit numbers. [3, H, W]
    """
    encoded, name = _read(source, "The image")
    return decode_bytes(encoded, label or name, max_pixels)


def load_mask(
    source: Path | bytes | BinaryIO,
    size: tuple[int, int] | None,
    *,
    allow_full: bool = False,
    max_pixels: int = MAX_PIXELS,
    label: str | None = None,
) -> Tensor:
    """Read a mask: white (or, if it is drawn on a transparent canvas, opaque) is missing.

    Values in between count as missing from one half on.

    Args:
        source: A file, its bytes, or a stream of them.
        size: Height and width of the target that the mask belongs to, or None for any.
        allow_full: Accept a mask that leaves no known pixel.
        max_pixels: Larger masks are refused before they are decoded.
        label: What messages call the mask; the file's name unless given.

    Returns:
        Mask of zeros and ones. [H, W]

    Raises:
        InvalidScene: As for `load_image`; or the mask has another size, is empty or is full.
    """
    encoded, name = _read(source, "The mask")
    name = label or name
    mask = decode_mask(encoded, name, max_pixels)
    _check_mask(name, mask, size, allow_full=allow_full)
    return mask


def check_name(name: str) -> str:
    """A scene's name, if it can be published under that.

    Raises:
        InvalidScene: It breaks the registry's rule.
    """
    if not _NAME.fullmatch(name):
        raise InvalidScene(
            f"The scene name {name[:80]!r} could not be published: use 1 to 63 of a-z, 0-9, dot, "
            "underscore and hyphen, and begin with a letter or digit."
        )
    return name


def name_after(folder: Path) -> str:
    """What to call the scene in a folder: ``My Tower`` is my-tower.

    Raises:
        InvalidScene: The folder's name has no letter or digit that a scene's name may have.
    """
    plain = unicodedata.normalize("NFKD", folder.resolve().name)
    letters = "".join(c for c in plain.lower() if not unicodedata.combining(c))
    name = re.sub(r"[^a-z0-9._-]+", "-", letters)[:63].strip("._-")
    if not name:
        raise InvalidScene(
            f"The folder name {folder.resolve().name[:80]!r} gives the scene no name of a-z and "
            "0-9: give it one with --name."
        )
    return name


def load_scene(folder: Path, name: str | None = None) -> Scene:
    """Read a scene in the layout of RealBench: `ref/*`, `target/{target,mask[,gt]}.*`.

    Args:
        folder: Where the scene lies; hidden files and files that are no images are ignored.
        name: What to call the scene; the folder's name unless given.

    Raises:
        InvalidScene: A part is missing, ambiguous or cannot be used.
    """
    for part in (folder, folder / "ref", folder / "target"):
        if not part.is_dir():
            raise InvalidScene(
                f"There is no folder {part}: a scene holds ref/ with 1 to {MAX_REFERENCES}"
                " photographs and target/ with target.png and mask.png."
            )
    target, mask = _only(folder / "target", "target"), _only(folder / "target", "mask")
    if target is None or mask is None:
        missing = "target" if target is None else "mask"
        raise InvalidScene(
            f"{folder / 'target'} holds no image called {missing}.*: add {missing}.png."
        )
    return scene_from_paths(
        name or folder.resolve().name,
        _images(folder / "ref"),
        target,
        mask,
        truth=_only(folder / "target", "gt"),
    )


def scene_from_paths(
    name: str,
    references: Sequence[Path],
    target: Path,
    mask: Path,
    truth: Path | None = None,
) -> Scene:
    """Read a scene from explicit files; references are put in the order of their names.

    Raises:
        InvalidScene: A file cannot be used, or the files do not belong together.
    """
    _check_reference_count(name, len(references))
    ordered = sorted(references, key=lambda path: (path.name, str(path)))
    roles = [("ref", path) for path in ordered] + [("target", target), ("mask", mask)]
    if truth is not None:
        roles.append(("truth", truth))
    digests: dict[str, str] = {}
    encoded: list[bytes] = []
    for number, (role, path) in enumerate(roles):
        encoded.append(_read(path, "")[0])
        # Files of one name may come from several folders.
        key = f"{role}/{path.name}" if f"{role}/{path.name}" not in digests else f"{role}/{number}"
        digests[key] = hashlib.sha256(encoded[-1]).hexdigest()
    images = [
        load_image(photograph, label=path.name)
        for photograph, (role, path) in zip(encoded, roles, strict=True)
        if role != "mask"
    ]
    count = len(ordered)
    height, width = images[count].shape[-2:]
    return Scene(
        name=name,
        references=tuple(images[:count]),
        target=images[count],
        mask=load_mask(encoded[count + 1], (height, width), label=mask.name),
        truth=images[count + 1] if truth is not None else None,
        digests=digests,
    )


def _check_reference_count(name: str, count: int) -> None:
    if count == 0:
        raise InvalidScene(
            f"Scene {name!r} has no references: add 1 to {MAX_REFERENCES} photographs of the place."
        )
    if count > MAX_REFERENCES:
        raise InvalidScene(
            f"Scene {name!r} has {count} references, at most {MAX_REFERENCES} are used: keep the"
            f" {MAX_REFERENCES} that show the missing part best."
        )


def _check_mask(name: str, mask: Tensor, size: tuple[int, ...] | None, *, allow_full: bool) -> None:
    if size is not None:
        check_size(name, mask, size)
    if not mask.any():
        raise InvalidScene(
            f"{name} marks no pixel as missing: white (or opaque) is what will be filled, black"
            " what stays. Paint the hole white."
        )
    if mask.all() and not allow_full:
        raise InvalidScene(
            f"{name} marks every pixel as missing: white (or opaque) is what will be filled, black"
            " what stays. Invert it, or paint what should stay black."
        )


def check_size(name: str, image: Tensor, size: tuple[int, ...]) -> None:
    """Refuse an image or a mask that is not as large as the target.

    Args:
        name: What the message calls it.
        image: [..., H, W]
        size: Height and width of the target.

    Raises:
        InvalidScene: It is of another size.
    """
    if image.shape[-2:] != size:
        raise InvalidScene(_wrong_size(name, image, size))


def _wrong_size(name: str, image: Tensor, size: tuple[int, ...]) -> str:
    """The sentence that says which size was found, which is needed, and what to do."""
    (height, width), (wanted_height, wanted_width) = image.shape[-2:], size
    remedy = "export it at the target's own size"
    if (height, width) == (wanted_width, wanted_height) and height != width:
        remedy = "one of the two is turned by its EXIF orientation; save both upright"
    return (
        f"{name} is {width}x{height} pixels, the target {wanted_width}x{wanted_height}: {remedy}."
    )


def _read(source: Path | bytes | BinaryIO, name: str) -> tuple[bytes, str]:
    """The bytes of a source and what messages call it."""
    if isinstance(source, bytes):
        return source, name
    if not isinstance(source, Path):
        return source.read(), name
    try:
        return source.read_bytes(), source.name
    except OSError as error:
        raise InvalidScene(
            f"{source} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error


def _images(folder: Path) -> list[Path]:
    """Image files of a folder, hidden ones left out."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
    ]


def _only(folder: Path, stem: str) -> Path | None:
    """The one image of a folder with this stem, if there is one."""
    found = [path for path in _images(folder) if path.stem == stem]
    if len(found) > 1:
        raise InvalidScene(
            f"{folder} holds {' and '.join(path.name for path in found)}: keep one of them."
        )
    return found[0] if found else None
