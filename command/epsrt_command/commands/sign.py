"""epsrt sign: a signature by a private key, in the bundle's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from epsrt_command import show

EXAMPLES = """\
epsrt sign out/digits.epsrt --key private.pem
epsrt verify out/digits.epsrt --key public.pem
"""


def sign(
    bundle: show.BundleArgument,
    *,
    key: Annotated[Path, Option(metavar="PEM", help="A private key of curve P-256, P-384 or P-521, not encrypted.")],
    as_json: show.JsonOption = False,
) -> None:
    """Sign a bundle, and the engine files in it, so that others can tell that it is yours (OpenSSF model-signing)."""
    from epsrt.bundle import Bundle
    from epsrt.signing import sign

    opened = Bundle.open(bundle)
    signature = sign(opened.path, key)
    if as_json:
        show.print_json({"bundle": opened.manifest.digest, "signature": str(signature)})
    else:
        show.out().print(f"{bundle}: signed with {key}, in {signature.name}", soft_wrap=True)
