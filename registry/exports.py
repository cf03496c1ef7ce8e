"""Writing an export: files of a directory, or members of a tar file, each whole or not at all."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.blobs import blob_key
from registry.errors import CorruptObject
from registry.manifest import DirectoryExport

# Takes a name and what gives its bytes; the count that was written, 0 where they were there.
Write = Callable[[str, Callable[[], bytes]], int]


@contextmanager
def directory_writer(folder: Path) -> Iterator[Write]:
    """Writes files whole or not at all; sound ones that an earlier run left are kept."""
    present = DirectoryExport(folder)

    def write(name: str, data: Callable[[], bytes]) -> int:
        path = folder / name
        if path.exists() and name == blob_key(path.name):
            try:
                present.read(path.name)
                return 0
            except CorruptObject:
                path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            written = part.write_bytes(data())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return written

    folder.mkdir(parents=True, exist_ok=True)
    yield write


@contextmanager
def tar_writer(file: Path) -> Iterator[Write]:
    """Writes beside the file, which appears when it is complete."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    written: set[str] = set()

    try:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:

            def write(name: str, data: Callable[[], bytes]) -> int:
                if name in written:
                    return 0
                content = data()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                written.add(name)
                return len(content)

            yield write
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
