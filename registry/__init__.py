"""Versioned, content-addressed scene adapters with movable aliases; never imports torch."""

from registry.errors import (
    AlreadyExists,
    Conflict,
    CorruptObject,
    InvalidReference,
    InvalidUpload,
    LeaseLost,
    NotFound,
    PreconditionFailed,
    Protected,
    RegistryError,
    SignatureRefused,
    StorageUnavailable,
)
from registry.records import (
    AliasMove,
    Erasure,
    Fault,
    Lease,
    Page,
    Reference,
    Scene,
    Sweep,
    Tombstone,
    Version,
)
from registry.registry import Registry
from registry.search import Query

__all__ = [
    "AliasMove",
    "AlreadyExists",
    "Conflict",
    "CorruptObject",
    "Erasure",
    "Fault",
    "InvalidReference",
    "InvalidUpload",
    "Lease",
    "LeaseLost",
    "NotFound",
    "Page",
    "PreconditionFailed",
    "Protected",
    "Query",
    "Reference",
    "Registry",
    "RegistryError",
    "Scene",
    "SignatureRefused",
    "StorageUnavailable",
    "Sweep",
    "Tombstone",
    "Version",
]
