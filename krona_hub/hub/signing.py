"""Signatures of OpenSSF model-signing, with a key: an optional extra, `pip install krona-hub[sign]`.

Signed are weights, config and manifest; the card is not, so that its owner may edit it on the web.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from krona_hub.errors import IntegrityError, NotFoundError, UsageError
from krona_hub.hub.push_package import There
from krona_hub.hub.push_plan import is_same
from krona_hub.hub.repo_layout import CONFIG, MANIFEST, SIGNATURE, WEIGHTS

SIGNED = (WEIGHTS, CONFIG, MANIFEST)


def is_still_signed(paths: Mapping[str, Path], there: There) -> bool:
    """Whether the repository has a signature of exactly these files: signing twice never gives the same bytes."""
    files = there.listing.files if there.listing else {}
    return SIGNATURE in files and all(n in files and is_same(paths[n], files[n]) for n in SIGNED)


def sign_folder(paths: Mapping[str, Path], folder: Path, key: Path) -> dict[str, Path]:
    """The signature of the files that are to be signed, by name in the repository."""
    if not key.is_file():
        raise NotFoundError(f"{key}: no such key.", fix="Make one: openssl ecparam -name prime256v1 -genkey -noout.")
    _library()
    return {SIGNATURE: sign(paths, key, folder / SIGNATURE)}


def sign(paths: Mapping[str, Path], key: Path, out: Path) -> Path:
    """Write the signature of weights, config and manifest to `out`."""
    with _alone(paths) as folder, _told():
        _library().signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, out)
    return out


def check_can_verify(names: Collection[str], key: Path) -> None:
    """Raise what makes a check of the signature impossible, whatever the files hold: to be known before they come."""
    if SIGNATURE not in names:
        raise IntegrityError(
            "the repository has no signature.", fix="Ask its owner for one, or leave --verify-key out."
        )
    if not key.is_file():
        raise NotFoundError(f"{key}: no such key.", fix="Give the owner's public key, a PEM file.")
    _library()


def check_signature(paths: Mapping[str, Path], key: Path) -> None:
    """Raise IntegrityError unless `model.sig` among the files is a signature of the others by the owner of `key`."""
    check_can_verify(paths, key)
    with _alone(paths) as folder, _told():
        _library().verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, paths[SIGNATURE])


@contextmanager
def _alone(paths: Mapping[str, Path]) -> Iterator[Path]:
    """A folder with the signed files and nothing else, since a signature is one of a folder; links, no copies."""
    with TemporaryDirectory(prefix="krona-sign-") as name:
        for file in SIGNED:
            if file not in paths:
                raise IntegrityError(f"{file} is missing, which is part of the signature.", fix="Pull all files.")
            _link(paths[file].resolve(), Path(name) / file)
        yield Path(name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another disk
        shutil.copyfile(source, target)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise IntegrityError(
            f"the signature does not fit: {text[:200]}", fix="The files or the key are others."
        ) from error


def _library() -> Any:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise UsageError("signatures need more packages.", fix="pip install 'krona-hub[sign]'") from error
    return model_signing
