"""Signatures of bundles by elliptic-curve keys, in the format of OpenSSF model-signing. Needs the extra [signing].

A signature says who made a bundle, which its hashes cannot. Nothing here looks anything up in a network.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

from epsrt.errors import BundleError, EpsrtError, InputError, one_line
from epsrt.files import is_utf8, whole_file
from epsrt.manifest import SIGNATURE
from epsrt.raised import foreign, passed_over

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from model_signing import hashing, signing, verifying
except ImportError as error:
    raise InputError(f'signatures need {error.name or error}: pip install "epsrt[signing]"') from error

LIMIT = 1 << 20  # bytes of a key, and of a signature: a bundle has some twenty files, of 200 bytes each
CURVES = "curve P-256, P-384 or P-521 as PEM"
# over files that are damaged or hostile, and the packages whose classes those are besides Python's
_WRONG = (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_PACKAGES = ("binascii", "cryptography", "json", "pydantic_core")


def sign(bundle: Path, private_key: str | Path) -> Path:
    """Write a signature into the folder of a verified bundle, in the place of an older one; returns its path.

    It covers each file that is there now, those in engines/ too. `private_key` is a PEM file without a password, on one
    of NIST's curves P-256, P-384 and P-521. Raises InputError for another key, BundleError for a link in the folder,
    for a name that is no UTF-8 and for a mount point, and OSError where the folder or the one that it is in cannot be
    written.
    """
    config = signer(private_key)
    for path in (bundle, *bundle.rglob("*")):
        if not is_utf8(path.name):
            raise BundleError(f"{path} cannot be signed, for its name is no UTF-8: rename it")
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False))
    place = Path(os.path.realpath(bundle))
    waiting = place.with_name(f".{place.name}.{SIGNATURE}")  # what a killed process leaves in the folder were refused
    no_file = lambda why: BundleError(f"{bundle} cannot be signed ({why}): take out what is no file")  # noqa: E731
    try:
        with whole_file(waiting) as beside, _refused(no_file, (ValueError,)):
            config.sign(bundle, beside)
        return waiting.replace(bundle / SIGNATURE)
    except OSError as error:
        with passed_over(OSError):
            waiting.unlink(missing_ok=True)
        if error.errno == errno.EXDEV:
            raise BundleError(
                f"{bundle} cannot be signed, for it is a mount point: sign a copy of it, and copy its {SIGNATURE} here"
            ) from error
        if error.filename == str(waiting):
            error.filename, error.filename2 = str(bundle if error.filename2 else place.parent), None
        raise


def signer(private_key: str | Path) -> signing.Config:
    """A key, read and fit to sign with. Raises InputError like `sign`."""
    key = Path(private_key)
    free = next(name for n in count(1) if not Path(name := f"signing{n if n > 1 else ''}.pem").exists())

    def no_key(why: str) -> InputError:
        how = f'make one with "openssl ecparam -name prime256v1 -genkey -noout -out {free}"'
        if "is encrypted" in why:
            how = f'run "openssl pkey -in {shlex.quote(str(key))} -out {free}", and give {free}'
        return InputError(f"{key} is no private key of {CURVES} without a password ({why}): {how}")

    with _refused(no_key, wordless="it has no curve"):
        _check_file(key)
        return signing.Config().use_elliptic_key_signer(private_key=key)


def signed_files(bundle: Path, public_key: str | Path) -> dict[str, str]:
    """The hex SHA-256 of each file that a bundle's signature covers, by its path in the bundle.

    The signature alone is read: whoever uses a file compares it. Raises BundleError where there is none by the key,
    InputError where `public_key` is no PEM file of such a key.
    """
    key, how = Path(public_key), "openssl ec -in private.pem -pubout -out public.pem"
    with _refused(
        lambda why: InputError(f'{key} is no public key of {CURVES} ({why}): its owner runs "{how}"'),
        wordless="it has no curve",
    ):
        _check_file(key)
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    file, again = bundle / SIGNATURE, f"get the bundle again from who signs it with {key}"
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"{bundle} is not signed: it has no {SIGNATURE}: {again}")
    if file.stat().st_size > LIMIT:
        raise BundleError(f"{file} is {file.stat().st_size} bytes, more than any signature: {again}")
    signed = _Signed()
    with _refused(lambda why: BundleError(f"{file} is no signature by {key} ({why}): {again}")):
        config.set_hashing_config(signed).verify(bundle, file)
    return signed.files


class _Signed:
    """What model-signing takes for its hashing, and for the result: it keeps what a signature says of the files.

    model-signing would hash them by their paths: not what is used of them later, and each a second time.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def hash(self, path: object, *, files_to_hash: object = None) -> Self:
        return self

    def add_ignored_paths(self, **paths: object) -> None:
        pass

    def __eq__(self, signed: Any) -> bool:
        self.files = {each.identifier: each.digest.digest_hex for each in signed.resource_descriptors()}
        return True


def _check_file(key: Path) -> None:
    """Raise ValueError for what a key's reader would wait for, or read without end."""
    found = key.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > LIMIT:
        raise ValueError(f"it is {found.st_size} bytes, more than any key")


@contextmanager
def _refused(
    sentence: Callable[[str], EpsrtError],
    errors: tuple[type[Exception], ...] = (OSError, *_WRONG),
    wordless: str = "it is damaged",
) -> Iterator[None]:
    """Around model-signing: what it raises becomes a sentence with the reason in it.

    `wordless` is the reason where it stumbles over what is not there, and speaks of its own objects.
    """
    try:
        yield
    except errors as error:
        if foreign(error, *_PACKAGES):
            raise
        reason = error.strerror if isinstance(error, OSError) else one_line(error, 200)
        if isinstance(error, InvalidSignature):  # which says nothing
            reason = "it was made with another key, or changed since"
        elif isinstance(error, (LookupError, AttributeError, TypeError)) and "encrypted" not in str(error):
            reason = wordless
        raise sentence(reason or type(error).__name__) from error
