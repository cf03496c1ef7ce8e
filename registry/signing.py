"""Signatures of capsules, made and checked with the model-signing package (extra `signing`).

A signature says that the holder of a private key vouches for these bytes. It lies in the store
beside the capsule, at `signatures/sha256/ab/<digest>`: a Sigstore bundle over an in-toto statement
with the file's SHA-256. Keys are elliptic (P-256, P-384, P-521) and plain PEM files, so that
nothing is asked over the network.

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from registry.errors import CorruptObject, InvalidReference, SignatureRefused
from registry.keeper import person
from registry.ledger import record
from registry.reader import now
from registry.records import DIGEST_PREFIX, Fault, Version

if TYPE_CHECKING:
    from registry.registry import Registry

log = logging.getLogger(__name__)

POLICY_VARIABLE = "REALFILL_REGISTRY_VERIFY"
# Paths of public keys; several are separated as in PATH.
KEYS_VARIABLE = "REALFILL_REGISTRY_KEYS"
# The name that the statement gives the capsule, whatever the file was called.
CAPSULE, BUNDLE = "capsule.safetensors", "capsule.sig"


class Policy(StrEnum):
    """What to do with a capsule whose signature is missing or wrong."""

    OFF = "off"
    WARN = "warn"
    REQUIRE = "require"


@dataclass(frozen=True)
class Guard:
    """Who is trusted, and how strictly.

    Args:
        policy: Off asks for nothing; warn logs; require refuses.
        keys: Public keys, PEM files; one of them must have signed.

    Raises:
        InvalidReference: A policy without a key, or a file that is not there.
        SignatureRefused: The package is not installed.
    """

    policy: Policy = Policy.OFF
    keys: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if self.policy is Policy.OFF:
            return
        if not self.keys:
            raise InvalidReference(
                f"The policy {self.policy.value!r} needs a public key to verify with: name a PEM "
                "file with --key."
            )
        for key in self.keys:
            _check_key(key)
        _package("verifying")

    def check(self, registry: Registry, version: Version, data: bytes) -> str | None:
        """Check the signature of a version's bytes; what is wrong, or None.

        Raises:
            SignatureRefused: Something is wrong, and the policy is require.
        """
        if self.policy is Policy.OFF:
            return None
        fault = self._fault(registry.blobs.signature(version.digest), version, data)
        if fault is None:
            return None
        if self.policy is Policy.REQUIRE:
            raise SignatureRefused(fault)
        log.warning(fault)
        return fault

    def faults(self, registry: Registry) -> list[Fault]:
        """What is wrong with the signatures of all versions that can be served.

        Versions whose bytes cannot be read are left to `Registry.verify`.
        """
        found: list[Fault] = []
        after: str | None = None
        while self.policy is not Policy.OFF:
            page = registry.search(after=after)
            for version in page.versions:
                try:
                    data = registry.fetch(f"{DIGEST_PREFIX}{version.digest}")
                except CorruptObject:
                    continue
                message = self._fault(registry.blobs.signature(version.digest), version, data)
                if message is not None:
                    found.append(Fault(SignatureRefused.code, version.reference, message))
            if page.after is None:
                break
            after = page.after
        return found

    def _fault(self, bundle: bytes | None, version: Version, data: bytes) -> str | None:
        if bundle is None:
            return (
                f"The version {version.reference} is not signed: sign it with "
                f"`registry sign {version.reference} --key private.pem`, or lower the policy."
            )
        if any(_is_signed(data, bundle, key) for key in self.keys):
            return None
        return (
            f"The signature of {version.reference} is not of these bytes and a trusted key: name "
            "the signer's public key, or publish and sign the capsule again."
        )


def sign(
    registry: Registry,
    reference: str,
    private_key: Path,
    *,
    password: str | None = None,
    by: str | None = None,
) -> Version:
    """Sign the version that a reference names now; an older signature is replaced.

    Args:
        private_key: PEM file with an elliptic key.
        password: Of the key, if it is encrypted.
        by: Who signs; the login name by default.

    Raises:
        InvalidReference: The key cannot be used, or the reference names nothing.
        SignatureRefused: The package is not installed.
    """
    _check_key(private_key)
    version = registry.resolve(reference)
    data = registry.fetch(f"{DIGEST_PREFIX}{version.digest}")
    registry.blobs.sign(version.digest, make_bundle(data, private_key, password))
    at, details = now(), {"number": version.number, "digest": version.digest}
    with registry.database.writing() as connection:
        record(connection, "version.signed", version.scene, person(by), at, details)
    return version


def make_bundle(data: bytes, private_key: Path, password: str | None = None) -> bytes:
    """The signature of a capsule's bytes, a Sigstore bundle.

    Raises:
        InvalidReference: The key cannot be used.
        SignatureRefused: The package is not installed.
    """
    signing = _package("signing")
    with tempfile.TemporaryDirectory() as folder:
        capsule, bundle = Path(folder) / CAPSULE, Path(folder) / BUNDLE
        capsule.write_bytes(data)
        secret: Any = None if password is None else password.encode()
        try:
            signer = signing.Config().use_elliptic_key_signer(
                private_key=private_key, password=secret
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidReference(
                f"The key {private_key} cannot sign ({str(error)[:200]}): give an unencrypted "
                "elliptic key in PEM, or its password."
            ) from error
        signer.sign(capsule, bundle)
        return bundle.read_bytes()


def _is_signed(data: bytes, bundle: bytes, public_key: Path) -> bool:
    """Whether the bundle is a signature of the data by this key."""
    verifying = _package("verifying")
    with tempfile.TemporaryDirectory() as folder:
        capsule, file = Path(folder) / CAPSULE, Path(folder) / BUNDLE
        capsule.write_bytes(data)
        file.write_bytes(bundle)
        try:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
            verifier.verify(capsule, file)
        # A bundle is foreign input, and the package raises what its parsers raise.
        except Exception as error:  # noqa: BLE001
            log.debug("signature refused by %s: %r", public_key, error)
            return False
    return True


def _check_key(key: Path) -> None:
    try:
        text = key.read_bytes()
    except OSError as error:
        raise InvalidReference(
            f"The key {key} cannot be read: {error.strerror}. Name a PEM file."
        ) from error
    if b"-----BEGIN" not in text:
        raise InvalidReference(f"The key {key} is no PEM file: write it with `openssl ec`.")


def _package(name: str) -> ModuleType:
    try:
        # The import takes a second, and only signatures need it.
        import model_signing
    except ImportError as error:
        raise SignatureRefused(
            f"Signatures need the package model-signing ({error}): install it with "
            "`pip install 'realfill-serve[signing]'`, or set the policy to off."
        ) from error
    module: ModuleType = getattr(model_signing, name)
    return module
