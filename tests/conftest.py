"""Settings and fixtures of every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before torch is imported, and inherited by the processes that tests start. The same number of
# threads everywhere: the order of a sum, and with it the last bit, must not depend on the machine.
# Where every core runs tests, two would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["BENTOML_DO_NOT_TRACK"] = "True"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def scenes_folder() -> Path:
    """Folder of the shared photo scenes, which are not part of the repository."""
    given = os.environ.get("REALFILL_SCENES")
    folder = Path(given) if given else ROOT.parent / "shared" / "scenes"
    if not folder.is_dir():
        pytest.skip(f"there are no shared scenes at {folder}; set REALFILL_SCENES to their folder")
    return folder
