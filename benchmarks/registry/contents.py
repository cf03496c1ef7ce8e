"""Capsules of any size, and registries of very many versions."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from safetensors.numpy import save
from sqlalchemy import insert

from registry.database import Database
from registry.schema import (
    alias_moves,
    aliases,
    blobs,
    metrics,
    scenes,
    tags,
    versions,
)
from registry.seals import seal_of

RANK = 8
BATCH = 1000
BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


def texts(scene: str) -> dict[str, str]:
    """The metadata of a sound capsule, about as long as a trained one's."""
    report = {"steps": 340, "probe": {str(step): 0.1 for step in range(0, 340, 10)}}
    return {
        "realfill.format": "1",
        "realfill.scene": scene,
        "realfill.base": "nano",
        "realfill.base_fingerprint": "5c" * 32,
        "realfill.rank": str(RANK),
        "realfill.alpha": str(RANK),
        "realfill.scale": "1.0",
        "realfill.target_modules": json.dumps(["to_q", "to_k", "to_v", "to_out.0"]),
        "realfill.prompt": "a photo of sks",
        "realfill.size_px": "512",
        "realfill.training": json.dumps(report),
        "realfill.digests": json.dumps({f"reference/{k}.png": "ab" * 32 for k in range(5)}),
        "realfill.licence": "none: random weights",
    }


def capsule(scene: str, seed: int, size_bytes: int) -> bytes:
    """A capsule of random factors, of about this size."""
    width = max(1, size_bytes // (2 * RANK * 2))
    generator = np.random.default_rng(seed)
    factors = {
        "unet.mid.to_q.lora_A": generator.random((RANK, width), np.float32).astype(np.float16),
        "unet.mid.to_q.lora_B": generator.random((width, RANK), np.float32).astype(np.float16),
    }
    return save(factors, texts(scene))


def fill(database: Database, scene_count: int, version_count: int) -> None:
    """Write the rows of scenes with that many versions each; their bytes are not there.

    Every version has a tag that a tenth of all share, one of its own, and a metric; `live` points
    to the last version of each scene.
    """
    rows: list[dict[str, Any]] = []
    for number in range(1, scene_count + 1):
        name = f"scene-{number:05}"
        rows += [_version(number, name, k, version_count) for k in range(1, version_count + 1)]
        if len(rows) >= BATCH or number == scene_count:
            _write(database, rows, version_count)
            rows = []


def _version(scene_id: int, scene: str, number: int, version_count: int) -> dict[str, Any]:
    place = scene_id * version_count + number
    row = {
        "scene_id": scene_id,
        "number": number,
        "digest": hashlib.sha256(f"{scene}@{number}".encode()).hexdigest(),
        "base": "nano",
        "base_fingerprint": "5c" * 32,
        "rank": RANK,
        "created": BEGINNING + timedelta(seconds=7 * place),
        "created_by": "bench",
        "retired": None,
        "parent": None,
    }
    metadata: dict[str, Any] = dict(texts(scene))
    for key in ("target_modules", "training", "digests"):
        metadata[f"realfill.{key}"] = json.loads(metadata[f"realfill.{key}"])
    text = f"{scene} bench a photo of sks"
    seal = seal_of({**row, "scene": scene})
    return {**row, "scene": scene, "metadata": metadata, "text": text, "seal": seal}


def _write(database: Database, rows: list[dict[str, Any]], version_count: int) -> None:
    names = {column.name for column in versions.columns}
    last = [row for row in rows if row["number"] == version_count]
    with database.writing() as connection:
        connection.execute(
            insert(scenes),
            [
                {"id": row["scene_id"], "name": row["scene"], "created": row["created"]}
                | {"last_number": version_count}
                for row in last
            ],
        )
        connection.execute(
            insert(blobs),
            [
                {"digest": row["digest"], "tensor_digest": row["digest"], "size_bytes": 6_000_000}
                | {"stored": row["created"]}
                for row in rows
            ],
        )
        connection.execute(
            insert(versions), [{key: row[key] for key in row if key in names} for row in rows]
        )
        keys = [{key: row[key] for key in ("scene_id", "number")} for row in rows]
        for key in ("part", "name"):
            values = [row["number"] % 10 if key == "part" else row["digest"][:12] for row in rows]
            connection.execute(
                insert(tags),
                [
                    {**at, "key": key, "value": str(value), "created": row["created"]}
                    for at, row, value in zip(keys, rows, values, strict=True)
                ],
            )
        connection.execute(
            insert(metrics), [{**at, "name": "psnr", "value": at["number"] / 3} for at in keys]
        )
        pointers = [{key: row[key] for key in ("scene_id", "number")} for row in last]
        connection.execute(insert(aliases), [{**at, "name": "live"} for at in pointers])
        moved = {"alias": "live", "action": "publish", "moved": BEGINNING, "moved_by": "bench"}
        connection.execute(insert(alias_moves), [{**at, **moved} for at in pointers])
