"""OpenSSF model-signing signatures with a key: an optional extra, `pip install krona-hub[sign]`.

Weights, config and manifest are signed; the card is not, so that its owner can edit it on the web.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from krona_hub.errors import IntegrityError, NotFoundError, UsageError
from krona_hub.hub.push_package import RepoState
from krona_hub.hub.push_plan import is_same
from krona_hub.hub.repo_layout import CONFIG, MANIFEST, SIGNATURE, WEIGHTS

SIGNED = (WEIGHTS, CONFIG, MANIFEST)


def is_still_signed(paths: Mapping[str, Path], there: RepoState) -> bool:
    """Whether the repository already has a signature of exactly these files: signing again gives other bytes."""
    files = there.listing.files if there.listing else {}
    return SIGNATURE in files and all(n in files and is_same(paths[n], files[n]) for n in SIGNED)


def sign_folder(paths: Mapping[str, Path], folder: Path, key: Path) -> dict[str, Path]:
    """Sign the files; return the signature by its name in the repository."""
    if not key.is_file():
        raise NotFoundError(f"{key}: no such key.", fix="Create one: openssl ecparam -name prime256v1 -genkey -noout.")
    _library()
    return {SIGNATURE: sign(paths, key, folder / SIGNATURE)}


def sign(paths: Mapping[str, Path], key: Path, out: Path) -> Path:
    """Write the signature of weights, config and manifest to `out`."""
    with _signed_folder(paths) as folder, _signature_errors():
        _library().signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, out)
    return out


def check_can_verify(names: Collection[str], key: Path) -> None:
    """Raise whatever makes verification impossible, before any file is downloaded."""
    if SIGNATURE not in names:
        raise IntegrityError("The repository has no signature.", fix="Ask the owner for one, or omit --verify-key.")
    if not key.is_file():
        raise NotFoundError(f"{key}: no such key.", fix="Specify the owner's public key, a PEM file.")
    _library()


def check_signature(paths: Mapping[str, Path], key: Path) -> None:
    """Raise IntegrityError unless `model.sig` is a signature of the other files by the owner of `key`."""
    check_can_verify(paths, key)
    with _signed_folder(paths) as folder, _signature_errors():
        _library().verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, paths[SIGNATURE])


@contextmanager
def _signed_folder(paths: Mapping[str, Path]) -> Iterator[Path]:
    """Yield a folder with only the signed files, as hard links, since a signature covers a folder."""
    with TemporaryDirectory(prefix="krona-sign-") as name:
        for file in SIGNED:
            if file not in paths:
                raise IntegrityError(f"The signed file {file} is missing.", fix="Pull all files.")
            _link(paths[file].resolve(), Path(name) / file)
        yield Path(name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, target)


@contextmanager
def _signature_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise IntegrityError(
            f"The signature does not match: {text[:200]}", fix="Check the files and the key."
        ) from error


def _library() -> Any:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise UsageError("Signatures need additional packages.", fix="pip install 'krona-hub[sign]'") from error
    return model_signing
