"""epsrt pack: an archive of a bundle with what was compiled and proven of it, for machines like this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from epsrt.engines import ENGINES
from epsrt.manifest import SIGNATURE
from epsrt_command import show
from epsrt_command.foreign import needs
from epsrt_command.options import Ahead

EXAMPLES = """\
epsrt pack out/digits.epsrt --for here
epsrt pack out/digits.epsrt --for here --batches 1,8 --features guidance --out digits.tar
epsrt pack out/digits.epsrt --for here --key private.pem
"""


def pack(
    bundle: show.BundleArgument,
    *,
    machines: Annotated[
        Literal["here"], Option("--for", help="For which machines: those with this processor or GPU, and engine.")
    ] = "here",
    out: Annotated[Path | None, Option(help="The archive; by default BUNDLE.tar.")] = None,
    engine: Annotated[
        str, Option(help=f"The engine whose models and proofs are packed: {', '.join(ENGINES[:-1])}.")
    ] = "openvino",
    ahead: Ahead,
    key: Annotated[
        Path | None, Option(metavar="PEM", help="Sign all that is packed with this private key; see epsrt sign.")
    ] = None,
    as_json: show.JsonOption = False,
) -> None:
    """Pack a bundle with what is compiled and proven of it. Run with --trust-engines, it does neither anew."""
    from epsrt.bundle import Bundle

    with needs("epsrt pack", "openvino"):
        from epsrt.pack import pack

    opened = Bundle.open(bundle)
    out = opened.path.with_name(f"{opened.path.name}.tar") if out is None else out
    with show.progress() as tell:
        made = pack(opened, out, engine=engine, **ahead.asked(opened), private_key=key, on_progress=tell)
    facts = {"pack": str(out), "models": made.models, "proofs": made.proofs, "bytes": out.stat().st_size}
    if as_json:
        show.print_json({"bundle": opened.manifest.digest, **facts})
        return
    size = show.size(out.stat().st_size)
    counts = ", ".join(
        f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((made.models, "model"), (made.proofs, "proof"))
    )
    show.out().print(f"{out}: {opened.path.name}, {counts}, {size}", soft_wrap=True)
    if key is None and (opened.path / SIGNATURE).is_file():
        show.note(f"{out}: the bundle's signature covers nothing that was compiled or proven: sign it all with --key")
