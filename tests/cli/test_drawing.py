"""What the drawing commands share: an engine that tells how far it is, before lanes are made and after."""

from __future__ import annotations

from pathlib import Path

import pytest

from epsrt import Bundle, open_engine
from epsrt.request import Request
from epsrt_command import drawing, show
from epsrt_command.options import Running


def test_an_engine_tells_the_bars_that_are_shown_while_it_draws(
    monkeypatch: pytest.MonkeyPatch, small_bundle_path: Path
) -> None:
    """TensorRT builds when lanes are made: its bar must be on the terminal then."""
    told = []

    def opened(bundle: Bundle, engine: str, *, on_progress, **options: object):
        told.append(on_progress)
        return open_engine(bundle, engine, threads=1)

    monkeypatch.setattr(drawing, "open_engine", opened)
    bundle, request = Bundle.open(small_bundle_path), Request(1, steps=2)
    work = drawing.checked(bundle, request)
    with drawing.sampler_of(bundle, work, Running(engine="onnxruntime")) as sampler:
        with show.progress() as tell:  # as `draw` asks for it
            assert [tell] == told
        assert drawing.draw(sampler, request, work, None).samples.shape == (1, 1, 8, 8)
    with show.progress() as later:
        assert later is not tell
