"""Two servers beside each other: they must draw the same, and the ratio is of good answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.load.compare import OURS, THEIRS, Load, Server, ask_at, check_alike, main, rows_of
from benchmarks.load.driver import Payload
from benchmarks.load.local import free_port
from tests.benchmarks.load.serving import Seen, served


def flat(level: float) -> np.ndarray:
    return np.full((4, 4, 3), level, np.float32)


def server(name: str, alone_s: list[float], good_per_s: list[float]) -> Server:
    levels = [{"goodput_per_s": good} for good in good_per_s]
    return Server(name, "http://127.0.0.1:1", Path(), alone_s, levels)


def test_pictures_of_a_scene_may_differ_by_little_of_what_scenes_differ_by() -> None:
    """Half of it passes; more, or scenes that do not differ at all, is an error."""
    check_alike([flat(100), flat(110)], [flat(105), flat(105 + 10)])
    with pytest.raises(RuntimeError, match=r"differ by 6\.00 of 255 .* by 10\.00"):
        check_alike([flat(100), flat(110)], [flat(106), flat(116)])
    with pytest.raises(RuntimeError, match=r"by 0\.00: they do not draw the same"):
        check_alike([flat(100), flat(110)], [flat(101), flat(101)])


def test_rows_are_of_each_servers_best_rate(tmp_path: Path) -> None:
    """Ours is best at the last rate, the peer at the first; a quick request is the median."""
    path = tmp_path / "rows.jsonl"
    ours = server(OURS, [0.5, 0.25, 1.0], [1.0, 1.5])
    theirs = server(THEIRS, [2.0], [0.25, 0.125])
    rows_of([ours, theirs], 3.0, ".4x20", path)
    rows = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert rows["load.goodput_ratio_peer.4x20"]["value"] == 6.0
    assert rows["load.goodput_per_s.4x20"]["peer_value"] == 0.25
    assert rows["load.alone_p50_s.4x20"]["value"] == 0.5
    assert rows["load.alone_p50_s.4x20"]["better"] == "lower"


def test_a_peer_without_a_good_answer_gives_no_ratio(tmp_path: Path) -> None:
    """Nothing is recorded, and the remedy is named."""
    path = tmp_path / "rows.jsonl"
    servers = [server(OURS, [1.0], [1.0]), server(THEIRS, [9.0], [0.0])]
    with pytest.raises(RuntimeError, match="raise --slo"):
        rows_of(servers, 3.0, "", path)
    assert not path.exists()


LOAD = {"duration_s": 0.5, "slo_s": 3.0, "zipf": 0.0, "seed": 0}
PAYLOAD = Payload(("target.png", b"target"), ("mask.png", b"mask"), {})


@pytest.mark.parametrize(("scene", "ended"), [("broken", "server error"), ("absent", "rejected")])
def test_a_server_that_errs_under_load_is_not_compared(
    scene: str, ended: str, tmp_path: Path
) -> None:
    """Its best rate would be one at which it still stood; the samples stay to be looked at."""
    load = Load({scene: PAYLOAD}, **LOAD)
    with served(Seen()) as url, pytest.raises(RuntimeError, match=f"peer: .* {ended}"):
        ask_at(Server(THEIRS, url, tmp_path), load, 10.0, place=1)
    assert list(tmp_path.glob("*/samples.jsonl"))


def test_a_server_that_died_under_load_is_not_compared(tmp_path: Path) -> None:
    """Connections that fail are no overload."""
    load = Load({"tower": PAYLOAD}, **LOAD)
    nobody = Server(OURS, f"http://127.0.0.1:{free_port()}", tmp_path)
    with pytest.raises(RuntimeError, match=r"ours: \d+ requests ended as connection"):
        ask_at(nobody, load, 10.0, place=0)


def test_requests_that_are_refused_under_load_count_as_overload(tmp_path: Path) -> None:
    """429 is what a service answers that has too much to do; it is not good, and no more."""
    with served(Seen()) as url:
        busy = Server(OURS, url, tmp_path)
        ask_at(busy, Load({"busy": PAYLOAD}, **LOAD), 10.0, place=0)
    assert busy.levels[0]["outcomes"]["throttled"] == busy.levels[0]["requests"] > 0


@pytest.mark.slow
def test_both_servers_are_started_loaded_and_stopped(tmp_path: Path) -> None:
    """The command on nano, shortly: a table, three rows, and samples of every rate."""
    outcome = CliRunner().invoke(
        main,
        ["--duration", "3", "--scenes", "2", "--steps", "1", "--candidates", "1", "--slo", "30"]
        + ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")],
    )
    assert outcome.exit_code == 0, outcome.output
    assert "Goodput within 30 s" in outcome.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [
        "load.goodput_ratio_peer.1x1",
        "load.goodput_per_s.1x1",
        "load.alone_p50_s.1x1",
    ]
    for name in (OURS, THEIRS):
        found = {path.parent.name for path in (tmp_path / "out" / name).glob("*/samples.jsonl")}
        assert found == {"0.6", "0.8", "1", "1.25"}
        assert (tmp_path / "out" / name / "server.log").is_file()
