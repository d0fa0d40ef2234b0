"""Some 3,700 emoji of 64 × 64 pixels, with categories and names, as archives to train on: out/emoji/*.npz.

    python examples/emoji_data.py

They come from npm's emoji-datasource-google 16.0.0 (74 MB; the art is Google's Noto, Apache-2.0, the package MIT), or,
where npm is missing, from Debian's fonts-noto-color-emoji and the list in its unicode-data. An archive has `images`
[N, 64, 64, 3] uint8 on white, `labels` [N], `class_names` (the categories) and `names` [N]. A tenth is held out, by
base emoji: the skin tones of one are nearly one picture. Emoji that one would not show to everybody are in neither
archive, so that no picture has them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError, features

from epsrt.errors import EpsrtError, InputError
from epsrt.files import sha256, whole_file

OUT = Path("out/emoji")
TRAIN, HELD_OUT = "train.npz", "held-out.npz"
PACKAGE = "emoji-datasource-google@16.0.0"
TARBALL = "emoji-datasource-google-16.0.0.tgz"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIDE = 64
TONES = range(0x1F3FB, 0x1F400)
JOINER, PRESENTATION = 0x200D, 0xFE0F
HELD = 0.1  # of the base emoji
# Gestures, weapons, smoking, death, and what is read as sex or filth.
OFFENSIVE = {0x1F595, 0x1F4A9, 0x1F92E, 0x1F52B, 0x1F52A, 0x1F5E1, 0x1F4A3, 0x1F6AC, 0x26B0, 0x1F346, 0x1F351}


@dataclass(frozen=True)
class Emoji:
    codes: tuple[int, ...]
    name: str
    category: str
    image: Image.Image

    @property
    def base(self) -> tuple[int, ...]:
        """The code points without skin tones and presentation."""
        return tuple(code for code in self.codes if code not in TONES and code != PRESENTATION)


def prepared(out: Path = OUT) -> tuple[Path, Path]:
    """The archives to train on and to measure with, made where they are not there yet.

    Raises InputError where the package is not whole, and where neither npm nor Debian's font is there.
    """
    train, held_out = out / TRAIN, out / HELD_OUT
    if train.exists() and held_out.exists():
        return train, held_out
    out.mkdir(parents=True, exist_ok=True)
    found = list(of_package(fetched(out)) if shutil.which("npm") or (out / TARBALL).exists() else of_font(FONT, LIST))
    kept = [e for e in found if not OFFENSIVE & set(e.codes) and e.category != "Component"]
    write(held_out, [e for e in kept if is_held_out(e.base)], kept)
    write(train, [e for e in kept if not is_held_out(e.base)], kept)
    return train, held_out


def fetched(folder: Path) -> Path:
    """npm's package in `folder`."""
    path = folder / TARBALL
    if not path.exists():
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            said = done.stderr.strip().splitlines()
            raise InputError(f"npm pack {PACKAGE} failed ({said[-1] if said else 'it says nothing'}): try it again")
    if (found := sha256(path)) != SHA256:
        raise InputError(
            f"{path} is cut off or changed ({found[:8]}…, not SHA-256 {SHA256[:8]}…): remove it and try again"
        )
    return path


def of_package(path: Path) -> Iterator[Emoji]:
    """The emoji of npm's package, skin tones after their base. Raises InputError where the archive is not whole."""
    try:
        with tarfile.open(path) as archive:
            files = {m.name: archive.extractfile(m) for m in archive if m.name.endswith((".json", ".png"))}
            inside = {name: file.read() for name, file in files.items() if file and "sheet" not in name}
        for entry in json.loads(inside["package/emoji.json"]):
            for drawn in (entry, *entry.get("skin_variations", {}).values()):
                codes = tuple(int(code, 16) for code in drawn["unified"].split("-"))
                image = Image.open(io.BytesIO(inside[f"package/img/google/{SIDE}/{drawn['image']}"])).convert("RGBA")
                yield Emoji(codes, (entry["name"] or entry["short_name"]).lower(), entry["category"], image)
    except (tarfile.TarError, EOFError, zlib.error, KeyError, ValueError, UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not the whole package {PACKAGE} ({error!r}): remove it and try again") from error


def of_font(font: Path, listed: Path) -> Iterator[Emoji]:
    """The emoji of a bitmap font, by Unicode's list. Sequences need Pillow with raqm; without it they are left out."""
    for path, package in ((font, "fonts-noto-color-emoji"), (listed, "unicode-data")):
        if not path.exists():
            raise InputError(f"neither npm nor {path} is here: install npm, or apt install {package}")
    drawn, group, whole = ImageFont.truetype(str(font), 109), "", features.check("raqm")  # its one size
    for line in listed.read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        codes, _, rest = line.partition(";")
        if not rest.lstrip().startswith("fully-qualified"):
            continue
        points = tuple(int(code, 16) for code in codes.split())
        if not whole and len([p for p in points if p != PRESENTATION]) > 1:
            continue
        canvas = Image.new("RGBA", (160, 160))
        text = "".join(map(chr, points))
        ImageDraw.Draw(canvas).text((12, 16), text, font=drawn, embedded_color=True)
        box = canvas.getbbox()
        if box is None or drawn.getlength(text) > 150:  # of a later Unicode than the font: nothing, or its parts
            continue
        name = rest.partition("#")[2].split(maxsplit=2)[2]
        x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
        square = canvas.crop((x - 64, y - 64, x + 64, y + 64))
        yield Emoji(points, name.partition(":")[0], group, square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def is_held_out(base: tuple[int, ...]) -> bool:
    """A tenth of all base emoji, the same ones always."""
    digest = hashlib.sha256("-".join(f"{code:x}" for code in base).encode()).digest()
    return int.from_bytes(digest[:4]) < HELD * 2**32


def write(path: Path, emoji: list[Emoji], all_of_them: list[Emoji]) -> None:
    """An archive of `emoji` on white, with the categories of all."""
    if not emoji:
        raise InputError(f"{path} would hold no emoji: {len(all_of_them)} were found in all")
    categories = sorted({e.category for e in all_of_them})
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    arrays: dict[str, Any] = {
        "images": np.stack([np.asarray(Image.alpha_composite(white, e.image).convert("RGB")) for e in emoji]),
        "labels": np.array([categories.index(e.category) for e in emoji]),
        "class_names": np.array(categories),
        "names": np.array([e.name for e in emoji]),
    }
    with whole_file(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)


def main() -> int:
    try:
        for path in prepared():
            with np.load(path) as archive:
                print(f"{path}: {len(archive['images']):,} emoji of {len(archive['class_names'])} categories")
    except EpsrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
