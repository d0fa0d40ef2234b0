"""epsrt.machine: what nvidia-smi says."""

from __future__ import annotations

from pathlib import Path

import pytest

from epsrt import machine


def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi("clocks.sm") == {}
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "1980, [N/A], 580.159.03"\n')
    script.chmod(0o755)
    assert machine.nvidia_smi("clocks.sm", "power.draw", "driver_version") == {
        "clocks.sm": 1980.0,
        "driver_version": "580.159.03",
    }
    assert machine.nvidia_smi("clocks.sm") == {}  # another number of answers
