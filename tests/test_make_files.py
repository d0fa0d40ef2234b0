"""The page of files as people have them is made of what was said, and no case of it is missing."""

import json
from importlib.util import find_spec

import pytest

from make_files import KEPT, PAGE, cases, page


def test_the_page_is_what_was_kept():
    assert PAGE.read_text() == page()
    kept = json.loads(KEPT.read_bytes())
    assert all({"command", "before", "now"} <= set(row) for row in kept.values())


def test_every_case_is_on_the_page():
    for package in ("diffusers", "denoising_diffusion_pytorch", "ema_pytorch"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the files are made by it")
    assert [case.words for case in cases()] == list(json.loads(KEPT.read_bytes()))
