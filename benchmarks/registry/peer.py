"""MLflow in a virtual environment of its own, so that its dependencies never meet ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import environment, run

# What the client needs for a registry on SQLite; the full package adds only servers and plots.
PACKAGES = ("mlflow-skinny>=3.5,<4", "sqlalchemy>=2,<3", "alembic>=1.10,<2")
SCRIPT = Path(__file__).parent / "mlflow_client.py"
RUN_S = 1800


@dataclass(frozen=True)
class Peer:
    """What MLflow took: seconds of each call, by what it does."""

    name: str
    seconds: dict[str, list[float]]


def measure(folder: Path, database: Path, repeats: int) -> Peer:
    """Let MLflow's client register, alias and resolve that many times on a new SQLite file.

    Raises:
        RuntimeError: It failed.
    """
    try:
        python = environment(folder, PACKAGES, "mlflow")
    except RuntimeError as error:
        raise RuntimeError(f"{error} Or measure without it by --no-peer.") from error
    done = run([str(python), str(SCRIPT), str(database), str(repeats)], RUN_S)
    if done.returncode:
        raise RuntimeError(
            f"MLflow's client failed ({done.stderr.strip()[-300:]}): remove {folder} to install "
            "it anew, or measure without it by --no-peer."
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    versions = answer["versions"]
    name = f"MLflow {versions['mlflow-skinny']} client, SQLite file"
    return Peer(name, answer["seconds"])
