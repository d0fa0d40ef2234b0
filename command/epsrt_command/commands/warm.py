"""epsrt warm: compile and prove ahead, into the engine cache."""

from __future__ import annotations

from epsrt_command import show
from epsrt_command.options import Ahead

EXAMPLES = """\
epsrt warm out/digits.epsrt
epsrt warm out/digits.epsrt --batches 1,8,32 --features guidance
epsrt warm canvas.epsrt --engine openvino --batches 4 --size 16x24
"""


def warm(
    bundle: show.BundleArgument, *, engine: show.EngineOption = "auto", ahead: Ahead, as_json: show.JsonOption = False
) -> None:
    """Compile and prove now what samplers of this user will need here, so that their first call does not wait."""
    from epsrt.bundle import Bundle
    from epsrt.warming import warm

    opened = Bundle.open(bundle)
    with show.progress() as tell:
        made = warm(opened, engine=engine, **ahead.asked(opened), on_progress=tell)
    if as_json:
        show.print_json({"bundle": opened.manifest.digest, "made": [str(path) for path in made]})
        return
    console = show.out()
    for path in made:
        console.print(f"made {path}", soft_wrap=True)
    console.print(f"{bundle}: {'ready' if made else 'ready, nothing was to be made'}", soft_wrap=True)
