"""Everything that the registry raises on purpose.

RegistryError
├── InvalidReference    text that names no scene, version or alias
├── InvalidUpload       bytes that are not a sound capsule
├── NotFound            nothing of that name is here
├── AlreadyExists       the bytes are here already, but retired
├── Conflict            a change that the present state forbids
│   ├── PreconditionFailed  an alias that does not point where it was expected to
│   └── Protected           an alias that moves by an override only
├── LeaseLost           a claim that expired before it was used
├── CorruptObject       stored bytes that differ from their digest
├── SignatureRefused    a signature that is missing, wrong or too old
└── StorageUnavailable  a disk, bucket or database that does not answer
"""

from __future__ import annotations


class RegistryError(Exception):
    """Base of the tree; the message names the thing, the value and the remedy."""

    code = "registry_error"


class InvalidReference(RegistryError):
    """The text cannot name a scene, a version or an alias."""

    code = "invalid_reference"


class InvalidUpload(RegistryError):
    """The bytes are not a sound capsule; nothing was stored."""

    code = "invalid_upload"


class NotFound(RegistryError):
    """The registry holds no such scene, version or alias."""

    code = "not_found"


class AlreadyExists(RegistryError):
    """The scene holds these bytes already, in a version that was retired."""

    code = "already_exists"


class Conflict(RegistryError):
    """The present state forbids the change, for instance an alias that points to the version."""

    code = "conflict"


class PreconditionFailed(Conflict):
    """The alias does not point to the version that the caller expected: it moved meanwhile."""

    code = "precondition_failed"


class Protected(Conflict):
    """The alias is protected, and the change is no override."""

    code = "protected"


class LeaseLost(RegistryError):
    """The claim expired, or another process holds it now."""

    code = "lease_lost"


class CorruptObject(RegistryError):
    """Stored bytes are missing or differ from the digest that the database holds."""

    code = "corrupt_object"


class SignatureRefused(RegistryError):
    """A capsule or a webhook whose signature is missing, wrong or too old."""

    code = "signature_refused"


class StorageUnavailable(RegistryError):
    """The disk, the bucket or the database does not answer or has no room."""

    code = "storage_unavailable"
