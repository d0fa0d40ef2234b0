"""Signatures of bundles by elliptic-curve keys, in the format of OpenSSF model-signing. Needs the extra [signing].

A signature says who made a bundle, which its hashes cannot. Nothing here looks anything up in a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from epsrt.errors import BundleError, EpsrtError, InputError, one_line
from epsrt.files import whole_file
from epsrt.manifest import SIGNATURE
from epsrt.raised import foreign

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from model_signing import hashing, signing, verifying
except ImportError as error:
    raise InputError(f'signatures need {error.name or error}: pip install "epsrt[signing]"') from error

LIMIT = 1 << 20  # bytes of a signature: a bundle has some twenty files, of 200 bytes each
CURVES = "curve P-256, P-384 or P-521 as PEM"
# over files that are damaged or hostile, and the packages whose classes those are besides Python's
_WRONG = (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_PACKAGES = ("binascii", "cryptography", "json", "pydantic_core")


def sign(bundle: Path, private_key: str | Path) -> Path:
    """Write a signature into the folder of a verified bundle, in the place of an older one; returns its path.

    It covers each file that is there now, those in engines/ too. `private_key` is a PEM file without a password, on one
    of NIST's curves P-256, P-384 and P-521. Raises InputError for another key, BundleError for a link in the folder,
    and OSError where the folder or the one that it is in cannot be written.
    """
    key, how = Path(private_key), "openssl ecparam -name prime256v1 -genkey -noout -out private.pem"
    what = f"no private key of {CURVES} without a password"
    with _refused(lambda why: InputError(f'{key} is {what} ({why}): make one with "{how}"')):
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False))
    waiting = bundle.with_name(f".{bundle.name}.{SIGNATURE}")  # what a killed process leaves in the folder were refused
    no_file = lambda why: BundleError(f"{bundle} cannot be signed ({why}): take out what is no file")  # noqa: E731
    with whole_file(waiting) as beside, _refused(no_file, (ValueError,)):
        config.sign(bundle, beside)
    return waiting.replace(bundle / SIGNATURE)


def signed_files(bundle: Path, public_key: str | Path) -> dict[str, str]:
    """The hex SHA-256 of each file that a bundle's signature covers, by its path in the bundle.

    The signature alone is read: whoever uses a file compares it. Raises BundleError where there is none by the key,
    InputError where `public_key` is no PEM file of such a key.
    """
    key, how = Path(public_key), "openssl ec -in private.pem -pubout -out public.pem"
    with _refused(lambda why: InputError(f'{key} is no public key of {CURVES} ({why}): its owner runs "{how}"')):
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


@contextmanager
def _refused(
    sentence: Callable[[str], EpsrtError], errors: tuple[type[Exception], ...] = (OSError, *_WRONG)
) -> Iterator[None]:
    """Around model-signing: what it raises becomes a sentence with the reason in it."""
    try:
        yield
    except errors as error:
        if foreign(error, *_PACKAGES):
            raise
        reason = error.strerror if isinstance(error, OSError) else one_line(error, 200)
        if isinstance(error, InvalidSignature):  # which says nothing
            reason = "it was made with another key, or changed since"
        raise sentence(reason or type(error).__name__) from error
