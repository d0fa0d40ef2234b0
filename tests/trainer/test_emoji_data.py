"""examples/emoji_data.py: the archives of emoji, from a small package like npm's and from a font."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epsrt.errors import InputError
from epsrt.files import sha256
from epsrt_trainer.data import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def emoji_data(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import emoji_data

    yield emoji_data
    del sys.modules["emoji_data"]


def png(colour, mode="RGBA"):
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).convert(mode).save(file, "PNG")
    return file.getvalue()


def entry(unified, category="Objects", tones=()):
    drawn = {tone: {"unified": f"{unified}-{tone}", "image": f"{unified}-{tone}.png".lower()} for tone in tones}
    made = {"unified": unified, "image": f"{unified}.png".lower(), "name": f"NAME {unified}", "short_name": "short"}
    return made | {"category": category} | ({"skin_variations": drawn} if drawn else {})


def package(path, entries, lost=()):
    """npm's layout, each picture in a colour of its own, transparent to the right."""
    files = {"package/emoji.json": json.dumps(entries).encode()}
    for k, drawn in enumerate(d for e in entries for d in (e, *e.get("skin_variations", {}).values())):
        files[f"package/img/google/64/{drawn['image']}"] = png((k, 100, 200, 255), "P" if k % 2 else "RGBA")
    files["package/img/google/sheets/64.png"] = b"no picture that anybody reads"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            if name not in lost:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def many():
    """Forty bases, the first ten with two skin tones each, one that is offensive, and one that is no emoji alone."""
    tones = ("1F3FB", "1F3FF")
    listed = [entry(f"{0x1F600 + k:X}", ("Animals", "Objects")[k % 2], tones if k < 10 else ()) for k in range(40)]
    return [*listed, entry("1F595", "People", tones), entry("1F3FB", "Component")]


@pytest.fixture
def prepared(emoji_data, many, tmp_path, monkeypatch):
    """prepared(): the archives of that package, without npm."""

    def prepare(**options):
        package(tmp_path / emoji_data.TARBALL, many, **options)
        monkeypatch.setattr(emoji_data, "SHA256", sha256(tmp_path / emoji_data.TARBALL))
        return emoji_data.prepared(tmp_path)

    return prepare


def test_archives_that_the_trainer_reads(prepared, emoji_data):
    train, held_out = prepared()
    seen, unseen = load(train), load(held_out)
    assert len(seen) + len(unseen) == 60
    assert seen.class_names == unseen.class_names == ("Animals", "Objects")
    assert seen.shape == unseen.shape == (3, 64, 64)
    names = {path: list(np.load(path)["names"]) for path in (train, held_out)}
    bases = [{name.partition("-")[0] for name in found} for found in names.values()]
    assert not bases[0] & bases[1]  # a skin tone is on the side of its base
    assert len(bases[0] | bases[1]) == 40
    assert not any("1f595" in name for found in names.values() for name in found)
    first = names[train][0]
    assert seen.images[0, :, 0, 0].tolist()[1:] == [100, 200]
    assert first.startswith("name 1f6")
    before = train.read_bytes()
    assert emoji_data.prepared(train.parent) == (train, held_out)  # what is there is kept
    assert train.read_bytes() == before


def test_about_a_tenth_is_held_out_and_the_same_always(emoji_data):
    held = [code for code in range(0x1F300, 0x1F700) if emoji_data.is_held_out((code,))]
    assert 60 < len(held) < 150
    assert held[:3] == [0x1F306, 0x1F30A, 0x1F30D]
    e = emoji_data.Emoji((0x1F44B, 0x1F3FB, 0xFE0F), "", "", Image.new("RGBA", (1, 1)))
    assert e.base == (0x1F44B,)


def test_pictures_stand_on_white(emoji_data, tmp_path):
    half = Image.new("RGBA", (64, 64))
    half.paste((0, 0, 0, 255), (0, 0, 32, 64))
    e = emoji_data.Emoji((1,), "half", "Objects", half)
    emoji_data.write(tmp_path / "a.npz", [e], [e])
    image = load(tmp_path / "a.npz").images[0]
    assert (int(image[:, :, :32].max()), int(image[:, :, 32:].min())) == (0, 255)


def test_a_package_that_is_cut_off_or_lacks_a_picture(prepared, emoji_data, tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match="is not the whole package emoji-datasource-google@16.0.0 .*remove it and try"):
        prepared(lost=["package/img/google/64/1f605.png"])
    path = tmp_path / emoji_data.TARBALL
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{path} is cut off or changed .*: remove it and try again"):
        emoji_data.prepared(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for damaged in (whole[:-30], whole[:40], b"", gzip.compress(b"no archive of this kind" * 50)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not the whole package"):
            list(emoji_data.of_package(path))
    monkeypatch.setattr(emoji_data, "OUT", tmp_path)
    monkeypatch.setattr(emoji_data.prepared, "__defaults__", (tmp_path,))
    assert emoji_data.main() == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_npm_that_fails_and_no_npm_at_all(emoji_data, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "npm"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'npm error network is unreachable' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    with pytest.raises(InputError, match=r"npm pack emoji.* failed \(npm error network is unreachable\): try it again"):
        emoji_data.prepared(tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(emoji_data, "FONT", tmp_path / "no.ttf")
    with pytest.raises(InputError, match=r"neither npm nor .*no.ttf is here: .* apt install fonts-noto-color-emoji"):
        emoji_data.prepared(tmp_path / "out")


def test_a_font_is_drawn_by_unicodes_list(emoji_data, tmp_path, monkeypatch):
    """Of any font; that Debian's gives npm's pictures was looked at."""
    listed = tmp_path / "emoji-test.txt"
    listed.write_text(
        "# group: Symbols\n"
        "0041 ; fully-qualified # A E1.0 letter a\n"
        "0041 1F3FB ; fully-qualified # A E1.0 letter a: light skin tone\n"
        "0042 ; unqualified # B E1.0 letter b\n"
    )
    from matplotlib import get_data_path

    monkeypatch.setattr(emoji_data.features, "check", lambda name: False)
    found = list(emoji_data.of_font(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), listed))
    assert [(e.codes, e.name, e.category) for e in found] == [((0x41,), "letter a", "Symbols")]
    assert found[0].image.size == (64, 64)
    assert found[0].image.getbbox() is not None
