"""The peer's side, run in its own environment: MLflow's client on an SQLite file.

Prints a JSON object: seconds of each call to register, alias and resolve, and the versions used.
It imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

WARM_UP = 5


def main(file: str, repeats: int) -> None:
    """Measure on a new database file."""
    from mlflow import MlflowClient  # type: ignore[import-not-found]

    client: Any = MlflowClient(tracking_uri=f"sqlite:///{file}", registry_uri=f"sqlite:///{file}")
    client.create_registered_model("publish")

    def seconds_of(call: Callable[[int], object]) -> list[float]:
        seconds = []
        for turn in range(WARM_UP + repeats):
            began = time.perf_counter()
            call(turn)
            seconds.append(time.perf_counter() - began)
        return seconds[WARM_UP:]

    measured = {
        "register": seconds_of(
            lambda turn: client.create_model_version("publish", f"/srv/adapters/{turn}")
        ),
        "alias": seconds_of(
            lambda turn: client.set_registered_model_alias("publish", "next", str(1 + turn % 2))
        ),
        "resolve": seconds_of(lambda turn: client.get_model_version_by_alias("publish", "next")),
    }
    versions = {name: version(name) for name in ("mlflow-skinny", "sqlalchemy")}
    print(json.dumps({"seconds": measured, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
