"""Which errors are whose fault, and the validators that stand once."""

import errno

import numpy as np
import pytest

from epsrt.errors import (
    BundleError,
    EngineError,
    EpsrtError,
    InputError,
    NotFiniteError,
    OutOfMemoryError,
    is_whole,
    of_system,
    one_line,
    one_of,
    typed,
    whole,
)


def test_only_bad_input_is_a_value_error():
    assert issubclass(InputError, EpsrtError)
    assert issubclass(InputError, ValueError)
    assert issubclass(BundleError, InputError)
    assert issubclass(OutOfMemoryError, EngineError)
    for kind in (EpsrtError, EngineError, OutOfMemoryError, NotFiniteError):
        assert issubclass(kind, EpsrtError)
        assert not issubclass(kind, ValueError)


@pytest.mark.parametrize("value", [0, -3, 1 << 70, np.int8(4), np.uint64(1 << 63), np.array(7)])
def test_whole_numbers(value):
    assert is_whole(value)
    assert type(whole("n", value)) is int
    assert whole("n", value) == int(value)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(2), "3", None, [1], np.array([1, 2]), 1j])
def test_what_is_no_whole_number(value):
    assert not is_whole(value)
    with pytest.raises(InputError, match=r"^batch = .* is not a whole number$"):
        whole("batch", value)


def test_a_whole_number_below_the_least():
    assert whole("every", 2, least=2) == 2
    with pytest.raises(InputError, match="^every = 1: give at least 2$"):
        whole("every", 1, least=2)


def test_one_line_of_a_paragraph():
    error = RuntimeError("Exception from\n\n   src/core.cpp:42:\n\tno   such layer\n")
    assert one_line(error) == "Exception from src/core.cpp:42: no such layer"
    assert one_line(error, 9) == "Exception"


def test_a_near_name_comes_first():
    assert one_of("Heum", ["ddim", "heun", "euler"]).startswith("did you mean heun? use one of ddim, heun, euler")
    methods = ["ddpm", "ddim", "euler", "euler-ancestral", "dpmpp-2s", "dpmpp-2m", "dpmpp-2m-sde"]
    for word, near in {
        "dpm++": "dpmpp-2s or dpmpp-2m or dpmpp-2m-sde",
        "DPM++ 2M": "dpmpp-2m or dpmpp-2m-sde",
        "euler_a": "euler-ancestral",
        "ancestral": "euler-ancestral",
        "sde": "dpmpp-2m-sde",
        "ddmp": "ddpm or ddim or dpmpp-2s",
    }.items():
        assert one_of(word, methods).startswith(f"did you mean {near}? use one of ddpm,"), word
    for word in ("", "+-", "x"):
        assert one_of(word, methods).startswith("use one of ddpm,")
    assert one_of("zzz", ["ddim", "heun"]) == "use one of ddim, heun"


@pytest.mark.parametrize(
    ("value", "like", "made"),
    [
        (np.bool_(True), False, True),
        (3.0, 1, 3),
        (2, 0.5, 2.0),
        (np.float32(0.5), 0.0, 0.5),
        ("a", None, "a"),
        (None, None, None),
    ],
)
def test_options_take_the_type_of_their_default(value, like, made):
    found = typed("x", value, like)
    assert found == made
    assert type(found) is type(made)


@pytest.mark.parametrize(
    ("value", "like", "what"),
    [
        (1, False, "true or false"),
        (True, 1, "a whole number"),
        (2.5, 1, "a whole number"),
        (float("nan"), 0.0, "a number"),
        (float("inf"), 1, "a whole number"),
        (3, "word", "a word"),
        (None, "word", "a word"),
        (3, None, "a word"),
    ],
)
def test_options_of_another_type(value, like, what):
    with pytest.raises(InputError, match=rf"^x = .* is not {what}$"):
        typed("x", value, like)


def test_a_whole_number_that_no_float_holds():
    with pytest.raises(InputError, match="x is a number of 401 digits: give one that a float holds"):
        typed("x", 10**400, 0.5)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\r", r"a\nb\r"),
        ("a\u202etxt.exe", r"a\u202etxt.exe"),
        ("a\u2028b\x9b", r"a\u2028b\x9b"),
        ("a\udcffb", r"a\udcffb"),
        ("naïve – 日本 × …", "naïve – 日本 × …"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(raw, shown):
    for kind in (EpsrtError, BundleError, EngineError):
        assert str(kind(raw)) == shown


def test_a_sentence_is_bounded():
    """Its beginning names the thing, its end the way out."""
    said = str(InputError(f"{'name' * 50_000} is unknown: {'x' * 500}: choose another"))
    assert len(said) <= 2000
    assert said.startswith("namename")
    assert said.endswith(": choose another")
    assert " … " in said
    assert len(str(InputError("\x1b" * 100_000))) <= 2000
    assert str(InputError("x" * 2000)) == "x" * 2000


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            "a.png: No space left on device: free some space, or write elsewhere",
        ),
        (OSError(errno.EIO, "Input/output error"), "a file: Input/output error: check the path"),
        (
            PermissionError(errno.EACCES, "Permission denied", b"a\xff\n"),
            r"a\udcff\n: Permission denied: change its permissions, or choose another place",
        ),
        (OSError("encoder error"), "a file: encoder error: check the path"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(error, said):
    assert of_system(error) == said
