"""Signatures of capsules, with the model-signing package and without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from registry import Conflict, InvalidReference, Registry, SignatureRefused
from registry.events import read_events
from registry.manifest import open_export
from registry.signing import Guard, Policy, sign
from registry.source import RegistrySource
from registry.transfer import export_scenes, import_scenes
from tests.registry.capsules import capsule


def write_keys(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """A private key and its public key as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    subject = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, subject))
    return private, public


@pytest.fixture
def full(registry: Registry) -> Registry:
    """A registry with two versions of tower."""
    for seed in range(2):
        registry.publish(capsule(seed=seed))
    return registry


def faults(registry: Registry, guard: Guard) -> list[str | None]:
    """What a guard says of both versions."""
    versions = [registry.resolve(f"tower@{number}") for number in (1, 2)]
    return [guard.check(registry, one, registry.fetch(one.reference)) for one in versions]


def test_a_signed_capsule_is_trusted(full: Registry, tmp_path: Path) -> None:
    """By its signer's key, one of several; the other version is not signed."""
    private, public = write_keys(tmp_path, "ada")
    _, other = write_keys(tmp_path, "bob")
    assert sign(full, "tower@1", private, by="ada").number == 1
    trusted, unsigned = faults(full, Guard(Policy.WARN, [other, public]))
    assert trusted is None
    assert "tower@2 is not signed" in str(unsigned)
    refused, _ = faults(full, Guard(Policy.WARN, [other]))
    assert "not of these bytes and a trusted key" in str(refused)
    event = read_events(full)[-1]
    assert (event.kind, event.data["by"]) == ("version.signed", "ada")


def test_policies_differ_in_what_they_do(full: Registry, tmp_path: Path) -> None:
    """Off asks nothing, warn says it, require refuses."""
    _, public = write_keys(tmp_path, "ada")
    assert faults(full, Guard()) == [None, None]
    assert None not in faults(full, Guard(Policy.WARN, [public]))
    with pytest.raises(SignatureRefused, match="sign it with `registry sign tower@1"):
        faults(full, Guard(Policy.REQUIRE, [public]))


def test_a_signature_of_other_bytes_is_refused(full: Registry, tmp_path: Path) -> None:
    """Moved to another capsule, torn, or no signature at all."""
    private, public = write_keys(tmp_path, "ada")
    sign(full, "tower@1", private)
    first, second = full.resolve("tower@1"), full.resolve("tower@2")
    signature = full.blobs.signature(first.digest)
    assert signature is not None
    guard = Guard(Policy.REQUIRE, [public])
    for forged in (signature, signature[:100], b"{}", b"\x00\xff"):
        full.blobs.sign(second.digest, forged)
        with pytest.raises(SignatureRefused, match="tower@2 is not of these bytes"):
            guard.check(full, second, full.fetch("tower@2"))
    assert guard.check(full, first, full.fetch("tower@1")) is None


def test_an_encrypted_key_needs_its_password(full: Registry, tmp_path: Path) -> None:
    """One sentence without it."""
    private, public = write_keys(tmp_path, "ada", b"open sesame")
    with pytest.raises(InvalidReference, match="or its password"):
        sign(full, "tower@1", private)
    sign(full, "tower@1", private, password="open sesame")
    assert faults(full, Guard(Policy.WARN, [public]))[0] is None


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_signatures_travel_with_their_capsules(full: Registry, tmp_path: Path, name: str) -> None:
    """Through an export and an import; who copies need not be trusted."""
    private, public = write_keys(tmp_path, "ada")
    sign(full, "tower@2", private)
    export_scenes(full, tmp_path / name)
    other = Registry.open(tmp_path / "other")
    import_scenes(other, open_export(tmp_path / name))
    assert faults(other, Guard(Policy.WARN, [public]))[1] is None


def test_an_import_keeps_the_signatures_that_are_there(full: Registry, tmp_path: Path) -> None:
    """An older export brings back no older signature, and one that is missing comes later."""
    old, _ = write_keys(tmp_path, "old")
    new, public = write_keys(tmp_path, "new")
    sign(full, "tower@1", old)
    export_scenes(full, tmp_path / "out")
    sign(full, "tower@1", new)
    import_scenes(full, open_export(tmp_path / "out"))
    other = Registry.open(tmp_path / "other")
    import_scenes(other, RegistrySource(full))
    sign(full, "tower@2", new)
    import_scenes(other, RegistrySource(full))
    for registry in (full, other):
        assert faults(registry, Guard(Policy.WARN, [public])) == [None, None]


def test_a_refused_import_leaves_no_signature(full: Registry, tmp_path: Path) -> None:
    """Bytes that another scene holds stay as they were, signed or not."""
    private, _ = write_keys(tmp_path, "ada")
    for number in (1, 2):
        sign(full, f"tower@{number}", private)
    other = Registry.open(tmp_path / "other")
    signed, unsigned = (other.publish(capsule(seed=seed), scene="bridge") for seed in range(2))
    other.blobs.sign(signed.digest, b"of another key")
    other.publish(capsule(seed=9))
    with pytest.raises(Conflict, match="version 1 is another one there"):
        import_scenes(other, RegistrySource(full))
    assert other.blobs.signature(signed.digest) == b"of another key"
    assert other.blobs.signature(unsigned.digest) is None


def test_an_erased_scene_leaves_no_signature(full: Registry, tmp_path: Path) -> None:
    """Bytes and signature go together."""
    private, _ = write_keys(tmp_path, "ada")
    digest = sign(full, "tower@1", private).digest
    full.erase("tower", reason="asked for")
    assert full.blobs.signature(digest) is None


def test_wrong_keys_are_named(full: Registry, tmp_path: Path) -> None:
    """A missing file, a file of another kind, and a policy without a key."""
    with pytest.raises(InvalidReference, match="cannot be read"):
        sign(full, "tower@1", tmp_path / "none.pem")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(InvalidReference, match="is no PEM file"):
        Guard(Policy.WARN, [tmp_path / "photo.png"])
    with pytest.raises(InvalidReference, match="needs a public key"):
        Guard(Policy.REQUIRE)


def test_without_the_package_the_message_says_what_to_install(
    full: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signing and a policy are refused; off still works."""
    private, public = write_keys(tmp_path, "ada")
    # What Python itself does where a package is absent.
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(SignatureRefused, match=r"pip install 'realfill-serve\[signing\]'"):
        sign(full, "tower@1", private)
    with pytest.raises(SignatureRefused, match="set the policy to off"):
        Guard(Policy.WARN, [public])
    assert faults(full, Guard()) == [None, None]
