"""tests/mutation: which changes it makes and leaves alone; what is said to be equivalent is a mutant of today."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

PLACE = Path(__file__).with_name("mutation")
ROOT = PLACE.parents[1]


@pytest.fixture(scope="module")
def changes():
    spec = importlib.util.spec_from_file_location("mutation_changes", PLACE / "changes.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


TEXT = '''
"""A file."""
import logging
Number = int | float
LIMIT = 3
class Value(Base, frozen=True):
    """A value."""
    size: int = 2
    @decorated(5)
    def grow(self, by: int = 1) -> int:
        logging.info("grows by %d", 5)
        if by < 0 and not self.size:
            raise ValueError(f"by {1 + 2}")
        return max(self.size, by) + 1
'''


def test_what_is_changed_and_what_is_left_alone(changes):
    found = {(m.where, m.old, m.new) for m in changes.mutants("a.py", TEXT)}
    condition = "if by < 0 and (not self.size):"
    assert found == {
        ("", "LIMIT = 3", "LIMIT = 4"),
        ("", "LIMIT = 3", "LIMIT = 2"),
        ("Value", "size: int = 2", "size: int = 3"),
        ("Value", "size: int = 2", "size: int = 1"),
        ("Value.grow", "def grow(self, by: int=1) -> int:", "def grow(self, by: int=2) -> int:"),
        ("Value.grow", "def grow(self, by: int=1) -> int:", "def grow(self, by: int=0) -> int:"),
        ("Value.grow", condition, "if by < 0 or not self.size:"),
        ("Value.grow", condition, "if by <= 0 and (not self.size):"),
        ("Value.grow", condition, "if by < 1 and (not self.size):"),
        ("Value.grow", condition, "if by < 0 and self.size:"),
        ("Value.grow", "raise ValueError(f'by {1 + 2}')", "pass"),
        ("Value.grow", "return max(self.size, by) + 1", "return max(self.size, by) - 1"),
        ("Value.grow", "return max(self.size, by) + 1", "return min(self.size, by) + 1"),
        ("Value.grow", "return max(self.size, by) + 1", "return max(self.size, by) + 2"),
        ("Value.grow", "return max(self.size, by) + 1", "return max(self.size, by) + 0"),
    }


def test_a_source_holds_one_change_and_a_mutant_the_lines_that_must_run(changes):
    every = changes.mutants("a.py", TEXT)
    (raised,) = [m for m in every if m.new == "pass"]
    assert raised.lines == (13, 13)
    ((_, text),) = changes.sources("a.py", TEXT, {raised.key}).items()
    assert "raise" not in text
    assert "LIMIT = 3" in text
    compile(text, "a.py", "exec")
    assert next(m for m in every if m.where == "Value").lines == changes.ANYWHERE  # a default


def test_what_is_said_to_be_equivalent_is_a_mutant_of_todays_code_and_has_a_reason(changes):
    proven = tomllib.loads((PLACE / "equivalent.toml").read_text())["equivalent"]
    known = {m.key for file in {e["file"] for e in proven} for m in changes.mutants(file, (ROOT / file).read_text())}
    for entry in proven:
        key = entry["file"], entry["where"], entry["old"], entry["new"]
        assert key in known, key
        assert len(entry["why"]) > 20
    assert len({(e["file"], e["where"], e["old"], e["new"]) for e in proven}) == len(proven)
