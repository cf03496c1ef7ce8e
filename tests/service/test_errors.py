"""The table of statuses."""

from __future__ import annotations

from types import ModuleType

import pytest

import realfill.errors
import registry.errors
import service.errors
from service.errors import STATUS, QueueFull, status_of


def _classes(module: ModuleType) -> list[type[Exception]]:
    found = vars(module).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, Exception)]


def test_statuses_are_pinned() -> None:
    """A status is part of the contract, so changing one must be on purpose."""
    assert {cls.__name__: status for cls, status in STATUS.items()} == {
        "RealFillError": 500,
        "InvalidScene": 422,
        "InvalidCapsule": 422,
        "AdapterMismatch": 409,
        "BaseUnavailable": 500,
        "MatcherUnavailable": 500,
        "TrainingDiverged": 500,
        "RegistryError": 500,
        "InvalidReference": 422,
        "InvalidUpload": 422,
        "NotFound": 404,
        "AlreadyExists": 409,
        "Conflict": 409,
        "PreconditionFailed": 412,
        "Protected": 409,
        "LeaseLost": 409,
        "CorruptObject": 500,
        "SignatureRefused": 500,
        "StorageUnavailable": 503,
        "ServiceError": 500,
        "InvalidSettings": 500,
        "InvalidRequest": 422,
        "InvalidQuery": 400,
        "UnsupportedMedia": 415,
        "NotAcceptable": 406,
        "BodyTooLarge": 413,
        "ImageTooLarge": 413,
        "QueueFull": 429,
        "Cancelled": 499,
        "DeadlineExceeded": 504,
        "EngineClosed": 503,
        "ServiceUnreachable": 500,
        "RequestRefused": 500,
    }


@pytest.mark.parametrize("module", [realfill.errors, registry.errors, service.errors])
def test_every_error_class_has_a_row(module: ModuleType) -> None:
    """Whoever adds an error decides its status, instead of inheriting 500 by accident."""
    assert [cls.__name__ for cls in _classes(module) if cls not in STATUS] == []


def test_every_code_names_one_error() -> None:
    """Clients tell errors apart by their code."""
    modules = (realfill.errors, registry.errors, service.errors)
    codes = {cls: cls.__dict__["code"] for m in modules for cls in _classes(m)}
    assert len(set(codes.values())) == len(codes)


def test_a_subclass_takes_its_nearest_ancestors_status() -> None:
    """The lookup goes along the MRO."""

    class LaneFull(QueueFull):
        pass

    assert status_of(LaneFull("full")) == 429


def test_a_foreign_error_is_500() -> None:
    """What is none of ours is our fault."""
    assert status_of(KeyError("x")) == 500
