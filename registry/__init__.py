"""Versioned, content-addressed scene adapters with movable aliases; never imports torch."""

from registry.errors import (
    AlreadyExists,
    Conflict,
    CorruptObject,
    InvalidReference,
    InvalidUpload,
    LeaseLost,
    NotFound,
    RegistryError,
    StorageUnavailable,
)
from registry.records import AliasMove, Fault, Reference, Scene, Version
from registry.registry import Registry

__all__ = [
    "AliasMove",
    "AlreadyExists",
    "Conflict",
    "CorruptObject",
    "Fault",
    "InvalidReference",
    "InvalidUpload",
    "LeaseLost",
    "NotFound",
    "Reference",
    "Registry",
    "RegistryError",
    "Scene",
    "StorageUnavailable",
    "Version",
]
