"""The registry's benchmark on a small registry: every part measures what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from benchmarks.record import read_rows
from benchmarks.registry import mlflow_client
from benchmarks.registry.__main__ import main
from benchmarks.registry.contents import capsule, fill
from registry import Query, Registry
from registry.database import Database
from registry.upload import inspect


def test_capsules_are_sound_and_of_the_size_that_was_asked_for() -> None:
    """The registry takes them, and no two are the same."""
    small, large = capsule("tower", 0, 64_000), capsule("tower", 1, 6_000_000)
    assert abs(len(small) - 64_000) < 4_000
    assert abs(len(large) - 6_000_000) < 10_000
    assert inspect(small).digest != inspect(capsule("tower", 1, 64_000)).digest


def test_filled_registry_looks_like_a_published_one(tmp_path: Path) -> None:
    """Its seals hold, its aliases resolve, and searches find its tags."""
    Registry.open(tmp_path).close()
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    fill(database, 3, 20)
    database.close()
    registry = Registry.open(tmp_path)
    assert registry.resolve("scene-00002").number == 20
    assert registry.resolve("scene-00002@7").tags["part"] == "7"
    assert len(registry.search(Query(tags={"part": "7"})).versions) == 6
    assert [scene.versions for scene in registry.scenes()] == [20, 20, 20]
    registry.close()


def test_every_part_leaves_rows(tmp_path: Path) -> None:
    """Rates, pages at many versions, and fetches, without the peer."""
    rows = tmp_path / "rows.jsonl"
    words = ["--versions", "1000", "--repeats", "3", "--no-peer", "--rows", str(rows)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = {row.name: row for row in read_rows(rows)}
    assert {
        "registry.publish_per_s",
        "registry.alias_per_s",
        "registry.resolve_per_s",
        "registry.resolve1k.p95_ms",
        "registry.list1k.p95_ms",
        "registry.fetch6mb.cold_p50_ms",
        "registry.fetch6mb.warm_p50_ms",
    } <= set(found)
    # A registry a hundredth as large would meet the target of the large one.
    assert "registry.resolve.p95_ms" not in found


def test_peer_s_script_asks_for_mlflow_and_nothing_of_ours() -> None:
    """It runs in an environment that has none of our packages."""
    program = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
    program += f"import runpy; runpy.run_path({str(mlflow_client.__file__)!r}); print('loaded')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "loaded\n"
