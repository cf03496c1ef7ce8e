"""A service in this process, over one small scene."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from realfill.base import Base
from service.http import create_app
from service.road import Lane
from service.settings import Settings
from tests.fakes import Serve, hole, photo, road_of
from tests.tiny import tiny_base, tiny_capsule


@pytest.fixture(scope="module")
def base() -> Base:
    """Small, of random weights."""
    return tiny_base()


@pytest.fixture(scope="module")
def capsule(base: Base) -> bytes:
    """Of the scene ``tower``."""
    return tiny_capsule(base, "tower", seed=1)


@pytest.fixture
def image() -> Tensor:
    """The photograph to complete, as a road takes it. [3, H, W]"""
    return torch.from_numpy(photo()).permute(2, 0, 1).contiguous()


@pytest.fixture
def mask() -> Tensor:
    """What is missing of it. [H, W]"""
    return torch.from_numpy(hole()) > 0


@pytest.fixture
def serve(base: Base, capsule: bytes, tmp_path: Path) -> Iterator[Serve]:
    """Starts services whose registry holds the capsule, and ends them."""
    clients: list[TestClient] = []

    def start(engine: Lane | None = None, **limits: Any) -> TestClient:
        road = road_of(base, tmp_path, engine)
        road.registry.publish(capsule)
        # The fake engine's fills are told apart by their grey.
        settings = Settings(**{"seamless": False, **limits})
        client = TestClient(create_app(road, settings))
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)
