"""Signatures of OpenSSF model-signing, where the extra is installed; what is said where it is not."""

import importlib.util

import pytest

from krona_hub.errors import IntegrityError, KronaError, UsageError
from krona_hub.hub import pull, push

REPO = "ana/style"
signing = pytest.mark.skipif(importlib.util.find_spec("model_signing") is None, reason="needs krona-hub[sign]")


@pytest.mark.skipif(importlib.util.find_spec("model_signing") is not None, reason="the extra is installed")
def test_without_the_extra_the_fix_names_it(hub, style, tmp_path):
    (tmp_path / "key.pem").write_text("-----BEGIN EC PRIVATE KEY-----")
    with pytest.raises(UsageError) as told:
        push(style, REPO, sign_key=tmp_path / "key.pem")
    assert "krona-hub[sign]" in told.value.fix and not hub.writes


@pytest.fixture
def keys(tmp_path):
    return new_keys(tmp_path)


def new_keys(folder):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    none, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@signing
def test_a_signed_push_is_verified_though_the_card_was_edited(hub, style, keys, tmp_path):
    push(style, REPO, sign_key=keys[0])
    hub.state.put(REPO, {"README.md": b"# My own card"})
    assert pull(REPO, tmp_path / "out", verify_key=keys[1]).written


@signing
def test_signing_the_same_again_commits_nothing(hub, style, keys):
    push(style, REPO, sign_key=keys[0])
    assert push(style, REPO, sign_key=keys[0]).up_to_date


@signing
def test_weights_that_were_exchanged_with_their_manifest_are_found_out(hub, style, other, keys, tmp_path):
    """Whoever may write can make everything fit but the signature."""
    push(style, REPO, sign_key=keys[0])
    push(other, "ana/forged")
    names = ("krona_adapter.safetensors", "krona_manifest.json", "config.json")
    hub.state.put(REPO, {name: hub.state.content("ana/forged", name) for name in names})
    assert pull(REPO, tmp_path / "unsigned").written, "all digests fit"
    with pytest.raises(IntegrityError, match="signature does not match"):
        pull(REPO, tmp_path / "out", verify_key=keys[1])
    assert not (tmp_path / "out").exists()


@signing
def test_the_key_of_somebody_else_is_found_out(hub, style, keys, tmp_path):
    push(style, REPO, sign_key=keys[0])
    (tmp_path / "other").mkdir()
    with pytest.raises(IntegrityError, match="signature does not match"):
        pull(REPO, tmp_path / "out", verify_key=new_keys(tmp_path / "other")[1])
    assert not (tmp_path / "out").exists()


@signing
def test_a_signature_of_other_weights_does_not_stay(hub, style, other, keys, tmp_path):
    push(style, REPO, sign_key=keys[0])
    report = push(other, REPO)
    assert ("model.sig", "delete") in {(r.file, r.action) for r in report.plan.rows}


def test_a_repository_without_signature_is_refused_where_one_is_wanted(hub, style, tmp_path):
    push(style, REPO)
    (tmp_path / "key.pub").write_text("-----BEGIN PUBLIC KEY-----")
    with pytest.raises(KronaError, match="has no signature"):
        pull(REPO, tmp_path / "out", verify_key=tmp_path / "key.pub")
    assert not (tmp_path / "out").exists()
