"""tests/trust, whose whole takes an hour: a small sample of it, and that each part notices what is wrong."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnx")

from epsrt import Bundle, BundleError, control
from epsrt.machine import has_bf16
from trust import bundles, damage, fuzz, hostile, kills, mutations, parts, replacement, results, soak, workers
from trust.targets import TARGETS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence" / "trust.md"


@pytest.fixture(scope="module", autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Parts silence logging, each in a process of its own; here they share one."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """What the parts set for themselves is undone."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "engine-cache"))


def trust(*words, out):
    """`python tests/trust` in a process of its own, which ignores SIGHUP as nohup makes it."""
    command = ["nohup", sys.executable, ROOT / "tests" / "trust", "--out", out, *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)


# --- a hundredth of it; kills of export and train, and the soak of OpenVINO, take longer than a test may ---

SHORT = ("mutations", "replacement", "kills-sample", "kills-compile", *(f"fuzz-{name}-0" for name in TARGETS))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    done = trust("--scale", "0.01", "--json", folder / "all.json", "--only", *SHORT, out=folder / "parts")
    assert (folder / "all.json").exists(), done.stdout + done.stderr
    return json.loads((folder / "all.json").read_text())["tables"], done


def findings(rows, harmless):
    """What was counted in the rows of a table besides what does no harm."""
    return {
        (row, count): n for row, each in rows.items() for count, n in each["counts"].items() if count not in harmless
    }


def test_mutations_are_refused_in_a_sentence_or_do_no_harm(short):
    rows = short[0]["mutations"]
    assert sum(row["counts"]["cases"] for row in rows.values()) == 100
    assert findings(rows, {"cases", "refused", "harmless"}) == {}, short[1].stdout
    assert set(rows) == set(mutations.KINDS)


def test_commands_that_are_killed_leave_nothing_half_made(short):
    rows = short[0]["kills"]
    assert {(name, row["counts"]["kills"], row["counts"]["whole runs"]) for name, row in rows.items()} == {
        ("sample", 4, 1),
        ("compile", 4, 1),
    }
    signals = Counter(f"by {sent.name}" for sent in kills.SIGNALS)
    assert all({name: row["counts"][name] for name in signals} == signals for row in rows.values())
    assert findings(rows, {"kills", "whole runs", *signals}) == {}, short[1].stdout


def test_what_is_drawn_while_files_are_replaced_is_the_digests(short):
    rows = short[0]["replacement"]
    assert set(rows) == {f"{kind} {engine}" for kind in ("opening", "open") for engine in bundles.ENGINES}
    counted = {"opens", "opened", "calls", "drawn", "refused", "drawn from the cache"}
    assert findings(rows, counted) == {}, short[1].stdout


def test_readers_take_changed_files_and_what_fuzzing_found_once(short):
    rows = short[0]["fuzz"]
    assert set(rows) == set(TARGETS)
    assert findings(rows, {"tries", "seconds"}) == {}, short[1].stdout
    assert all(row["counts"]["tries"] >= len(TARGETS[name].kept()) for name, row in rows.items())


# --- mutations ---


def test_a_case_is_the_same_again():
    assert [mutations.tried(case).what for case in range(8)] == [mutations.tried(case).what for case in range(8)]


def test_damage_that_the_bundle_does_not_notice_is_a_wrong_image(monkeypatch, tmp_path):
    """As if files were not checked: the harness must see that other weights draw other images."""
    other = bundles.other(bundles.path_of("small"), tmp_path / "net.epsrt")
    done = mutations.Mutation("other weights", False, "weights-fp32.bin")
    assert mutations.used(other, "small", "onnxruntime", done, False)[0] == "wrong image"
    signed = mutations.Mutation("other weights", True, "weights-fp32.bin")
    assert mutations.used(other, "small", "onnxruntime", signed, True) == ("harmless", "")


def test_what_is_no_sentence_is_a_traceback(monkeypatch):
    assert bundles.says(BundleError("net.epsrt is damaged: export it again")) == ""
    assert bundles.says(TypeError("no")) == "TypeError: 'no'"
    monkeypatch.setattr(BundleError, "__str__", lambda self: "\x1b[31m")
    assert bundles.says(BundleError()).startswith("control characters")
    monkeypatch.setattr(BundleError, "__str__", lambda self: "a" * 2001)
    assert bundles.says(BundleError()).startswith("2001 characters")


def test_every_hostile_graph_can_be_written():
    onnx = pytest.importorskip("onnx")
    for name, edit in hostile.GRAPHS.items():
        model = onnx.load(bundles.path_of("small") / "step-fp32.onnx", load_external_data=False)
        before = model.SerializeToString()
        edit(model)
        assert model.SerializeToString() != before, name


def test_damage_always_changes_something():
    rng = random.Random(1)
    for raw in (b"", b"a", b"\0" * 100, bytes(range(256)) * 20):
        assert all(damage.bytes_damaged(raw, rng) != raw for _ in range(50))


def test_a_third_of_the_cases_on_openvino_run_in_bf16(monkeypatch):
    def share(which, engine="openvino", name="tiny"):
        drawn = [bundles.precision(random.Random(i), engine, name) for i in range(1000)]
        return drawn.count(which) / 1000

    monkeypatch.setattr(bundles, "has_bf16", lambda: True)
    assert share("bf16") == pytest.approx(0.3, abs=0.05)
    assert share(None) == pytest.approx(0.03, abs=0.02)
    assert (share(None, name="digits"), share("fp32", "onnxruntime")) == (0, 1)
    monkeypatch.setattr(bundles, "has_bf16", lambda: False)
    assert share("fp32") == 1


@pytest.mark.skipif(not has_bf16(), reason="the processor has no bf16")
def test_a_case_in_bf16_draws_other_images_and_notices_other_weights(tmp_path):
    drawn = [bundles.images(bundles.path_of("tiny"), "openvino", p) for p in ("fp32", "bf16")]
    assert (drawn[0] != drawn[1]).any()
    other = bundles.other(bundles.path_of("tiny"), tmp_path / "net.epsrt")
    done = mutations.Mutation("other weights", False, "weights-fp32.bin")
    assert mutations.used(bundles.path_of("tiny"), "tiny", "openvino", done, False, "bf16") == ("harmless", "")
    assert mutations.used(other, "tiny", "openvino", done, False, "bf16") == ("wrong image", "bf16 ()")


# --- workers ---


def do(job):
    match job:
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "sleep":
            time.sleep(60)
    return job


def test_a_crash_and_a_hang_are_told_and_the_next_job_runs():
    found = list(workers.each(do, ["a", "abort", "b", "exit", "sleep", "c"], limit=1.0))
    assert [(how, answer) for _, how, answer in found] == [
        ("done", "a"),
        ("crash", "SIGABRT"),
        ("done", "b"),
        ("crash", "exit status 3"),
        ("hang", "over 1 s"),
        ("done", "c"),
    ]


# --- kills ---


def test_a_leftover_is_seen_wherever_the_folder_lies(tmp_path):
    """Under a folder named home, too: only the command's own home, beside its folder, does not count."""
    shop = object.__new__(kills.Shop)
    shop.place = tmp_path / "home" / "work"
    (shop.place / "home").mkdir(parents=True)
    (shop.place / "home" / ".left").touch()
    (tmp_path / "home" / "beside").touch()
    assert shop._names() == {"home", "home/.left"}


# --- replacement ---


@pytest.mark.parametrize("way", replacement.WAYS)
def test_replacing_puts_the_other_whole_bundle_there(way, tmp_path):
    """Or, of one file, what is neither; else the part would try nothing."""
    stage = replacement.Stage(tmp_path / "stage")
    stage.place.mkdir()
    stage.set_up(way)
    assert Bundle.open(stage.path).manifest == Bundle.open(stage.whole(0)).manifest
    for which in (1, 0, 1):
        stage.replace(way, random.Random(1))
        if way == "one file" and which:
            with pytest.raises(BundleError, match="weights-fp32.bin was changed"):
                Bundle.open(stage.path)
        else:
            assert Bundle.open(stage.path).manifest == Bundle.open(stage.whole(which)).manifest


def test_the_two_bundles_draw_different_images(tmp_path):
    other = bundles.other(bundles.path_of(bundles.FULL), tmp_path / "other.epsrt")
    for features in replacement.FEATURES:
        drawn = [
            bundles.images(path, "onnxruntime", "fp32", features) for path in (bundles.path_of(bundles.FULL), other)
        ]
        assert abs(drawn[0] - drawn[1]).max() > 0.01


# --- soak ---


def test_a_soak_sees_the_same_images_and_no_errors():
    found = soak.Soak("onnxruntime").run(6.0)
    assert found.findings == []
    assert found.before == found.after
    assert found.counts["requests"] > 20
    assert found.slope is None  # six seconds tell none


def test_calls_that_a_flag_or_a_deadline_does_not_end_are_findings(monkeypatch):
    tried = soak.Soak("onnxruntime")
    with tried.all_open():

        def both():
            for _ in range(8):  # before the first step, and after it
                tried._cancel("learned", 1)
                tried._pass_deadline("learned", 1)

        both()
        assert tried.found.findings == []
        assert tried.found.counts == {"cancelled": 8, "late": 8}
        monkeypatch.setattr(control.Control, "look", lambda self, lanes=(): None)
        both()
        assert tried.found.counts["not ended"] == 16


def test_memory_that_grows_is_a_slope():
    found = soak.Soaked(seconds=1800, memory=[(t, 1024 * t // 60) for t in range(0, 1800, 2)])  # a MiB a minute
    assert found.slope == pytest.approx(10, rel=0.01)
    flat = soak.Soaked(seconds=1800, memory=[(t, 50_000 + 5_000 * (t < 300)) for t in range(0, 1800, 2)])  # it warms up
    assert abs(flat.slope) < 1e-6


# --- fuzzing ---


def test_a_reader_that_fails_is_found_and_its_input_kept(tmp_path, monkeypatch):
    def use(data, path):
        raise RuntimeError("no reader")

    target = TARGETS["parity"]
    monkeypatch.setitem(TARGETS, "parity", type(target)("parity", target.seeds, use, target.mutate))
    monkeypatch.setattr(fuzz, "guided", lambda: False)
    found = fuzz.tried("parity", 30.0, tmp_path / "corpus", tmp_path / "found")
    assert len(found.findings) == fuzz.MOST
    assert all("RuntimeError: no reader" in finding for finding in found.findings)
    assert len(list((tmp_path / "found" / "parity").iterdir())) == len({f.split(":")[0] for f in found.findings})


# --- all of it ---


def test_a_stopped_run_goes_on_and_other_code_begins_anew(tmp_path):
    def ran():
        return trust("--scale", "0.0001", "--only", "mutations", "fuzz-parity", out=tmp_path).stdout.count(
            " findings\n"
        )

    assert ran() == 4  # parts
    assert ran() == 0
    (tmp_path / "fuzz-parity-1.json").unlink()
    assert ran() == 1
    kept = json.loads((tmp_path / "mutations-all-0.json").read_text())
    (tmp_path / "mutations-all-0.json").write_text(json.dumps({**kept, "source": "other"}))
    assert ran() == 1


def test_the_whole_tries_as_much_as_is_promised():
    every = parts.parts(1.0)
    assert len({part.name for part in every}) == len(every)
    ranges = Counter()
    for part in every:
        for given in part.run.args:
            if isinstance(given, range):
                ranges[part.table, part.row] += len(given)
    assert ranges["mutations", "all"] == 10_000
    assert {ranges["kills", program] * 4 for program in ("export", "train", "compile", "sample")} == {100}
    opening = sum(ranges["replacement", f"opening {engine}"] for engine in bundles.ENGINES)
    assert opening * replacement.OPENS == 500
    assert sum(ranges["replacement", f"open {engine}"] for engine in bundles.ENGINES) == 200
    assert sum(part.run.args[1] for part in every if part.table == "fuzz") == 30 * 60
    assert [part.run.args[1] for part in every if part.table == "soak"] == [1800, 1800]


def test_counts_of_parts_add_up():
    one = parts.Part("kills", "train", 0, print)
    two = parts.Part("kills", "train", 1, print)
    found = {
        one.name: {"counts": {"kills": 4, "leftovers": 1}, "findings": ["a"]},
        two.name: {"counts": {"kills": 8}, "figures": {"MiB": 3}, "findings": []},
    }
    both = results.together([one, two], found)
    assert both == {
        "tables": {"kills": {"train": {"counts": {"kills": 12, "leftovers": 1}, "figures": {"MiB": 3}}}},
        "findings": ["a"],
    }


@pytest.fixture(scope="module")
def tables():
    """docs/tools/trust.py."""
    spec = importlib.util.spec_from_file_location("trust_tables", ROOT / "docs" / "tools" / "trust.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_every_table_of_the_committed_results(tables):
    found = json.loads(tables.FILE.read_text())
    assert set(found["tables"]) == set(tables.COLUMNS)
    for name in ("machine", *tables.COLUMNS):
        assert PAGE.read_text().count(f"<!-- docs/tools/trust.py {name} -->") == 1


def test_the_page_says_how_much_of_the_whole_was_run(tables):
    found = json.loads(tables.FILE.read_text())
    said = {scale: tables.table("machine", {**found, "scale": scale}) for scale in (1, 0.06, 0.005)}
    assert "those of the whole, run on" in said[1]
    assert "those of 6 % of the whole, run on" in said[0.06]
    assert "those of 0.5 % of the whole, run on" in said[0.005]
    for row in found["tables"]["soak"].values():  # so the scale is that of the counts
        assert row["figures"]["minutes"] == pytest.approx(30 * found["scale"], abs=0.06)


def test_every_count_that_is_a_finding_has_a_column(tables):
    """Nothing that was found is left out of the page."""
    harmless = {"opened", "drawn", "drawn from the cache", "opened again", "refused"}
    for name, rows in json.loads(tables.FILE.read_text())["tables"].items():
        shown = {count for names in tables.COLUMNS[name][1].values() for count in names}
        for each in rows.values():
            assert {count for count in each["counts"] if not count.startswith("by ")} <= shown | harmless


def test_a_column_adds_up_its_counts(tables):
    row = {"counts": {"kills": 100, "another result": 1, "refused next run": 2}}
    head, _, line = tables.table("kills", {"tables": {"kills": {"train": row}}}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert (cells["command"], cells["kills"], cells["other results"], cells["leftovers"]) == ("train", "100", "3", "0")


def test_sources_of_another_day_have_another_digest(tmp_path, monkeypatch):
    before = results.digest()
    copy = Path(shutil.copytree(ROOT / "runtime" / "epsrt", tmp_path / "runtime" / "epsrt"))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    other = results.digest()
    (copy / "version.py").write_text("__version__ = '9'\n")
    third = results.digest()
    shutil.copytree(ROOT / "tests" / "data" / "tiny.epsrt", tmp_path / "tests" / "data" / "tiny.epsrt")
    fourth = results.digest()
    shutil.copy(ROOT / "tests" / "helpers.py", tmp_path / "tests")
    assert len({before, other, third, fourth, results.digest()}) == 5
