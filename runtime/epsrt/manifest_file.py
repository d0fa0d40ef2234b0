"""manifest.json as a file: what is read before anything of a bundle is believed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from epsrt.contents import open_plain, unreadable
from epsrt.errors import BundleError
from epsrt.manifest import FORMAT, MANIFEST, READABLE, SIGNATURE, Manifest, digest, render
from epsrt.raised import foreign

LIMIT = 64 << 20  # bytes


class _Wrote(msgspec.Struct):
    versions: dict[str, str]


class _Version(msgspec.Struct):
    """What is read of a manifest of any format: of its other fields only some may be as they are now."""

    format: int
    provenance: msgspec.Raw = msgspec.Raw()

    @property
    def written_by(self) -> str:
        """The version of epsrt that exported the bundle; "" where that is not to be found."""
        try:
            return msgspec.json.decode(self.provenance, type=_Wrote).versions.get("epsrt", "")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return ""


def read_manifest(
    bundle: Path, place: Path, public_key: str | Path | None = None
) -> tuple[Manifest, dict[str, str] | None]:
    """The manifest of the bundle at a path, which stands in `place`. Raises BundleError.

    Where a signature by a key is required also what it covers, by name: the manifest, and so all files.
    """
    path, file = bundle / MANIFEST, place / MANIFEST
    try:
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{bundle} has no {MANIFEST}: it is not a bundle, or its export was damaged")
        size = file.stat().st_size
        if size > LIMIT:
            raise BundleError(f"{path} is {size} bytes, more than any manifest: it is damaged")
        with open_plain(file) as opened:
            raw = opened.read(LIMIT)
    except OSError as error:
        if foreign(error):
            raise
        raise unreadable(path, error) from error
    signed = None
    if public_key is not None:
        from epsrt.signing import signed_files  # with its libraries, which nobody else needs

        signed = signed_files(bundle, public_key)
        if signed.get(MANIFEST) != hashlib.sha256(raw).hexdigest():
            raise BundleError(f"{path} is not what {SIGNATURE} beside it signs: copy the bundle again")
    try:
        version = msgspec.json.decode(raw, type=_Version)
        if version.format not in READABLE:
            raise BundleError(_of_another_format(path, version))
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a manifest ({error}): it is damaged, copy or export it again") from error
    if digest(manifest) != manifest.digest or render(manifest) != raw:
        raise BundleError(f"{path} was changed after its export (its digest differs): copy or export it again")
    return manifest, signed


def _of_another_format(path: Path, version: _Version) -> str:
    by = version.written_by
    if version.format > FORMAT:
        way = f"update epsrt to {by} or newer" if by else "update epsrt"
    else:
        way = "export the network again, or open the bundle with the version that wrote it"
    wrote = f"epsrt {by}" if by else "another version of epsrt"
    reads = f"formats {READABLE[0]} to {FORMAT}"
    return f"{path} has format {version.format}, written by {wrote}, and this one reads {reads}: {way}"
