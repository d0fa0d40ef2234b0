"""Sounds as files: signals [1 or 2, L] as .wav, 16 bits a sample."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np

from epsrt.files import whole_directory, whole_file
from epsrt.types import Float32

RATE = 16_000  # samples a second, where nobody says


def wav(samples: Float32, value_range: tuple[float, float], rate: int = RATE) -> bytes:
    """A .wav of signals float32 [n, C, L], one behind the other; `value_range` is full scale, and clips."""
    low, high = value_range
    scaled = (np.asarray(samples, np.float64) - low) / (high - low) * 65535 - 32768
    pixels = scaled.round().clip(-32768, 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.ascontiguousarray(pixels.transpose(0, 2, 1)).tobytes())
    return file.getvalue()


def save(path: Path, samples: Float32, value_range: tuple[float, float], rate: int = RATE) -> None:
    """Write one .wav of all, or where the path has no suffix a folder with a .wav each."""
    if path.suffix:
        with whole_file(path) as beside:
            beside.write_bytes(wav(samples, value_range, rate))
        return
    with whole_directory(path) as beside:
        for i in range(len(samples)):
            name = f"{i:0{len(str(len(samples) - 1))}d}.wav"
            (beside / name).write_bytes(wav(samples[i : i + 1], value_range, rate))
