"""Heights and widths as people write them, and what a network takes."""

import pytest

from epsrt import InputError
from epsrt_export.families.sides import height_and_width, suited


@pytest.mark.parametrize("given", [(32, 48), [32, 48], "32,48", "32x48", "32 X 48"])
def test_two(given):
    assert height_and_width("size", given) == (32, 48)


@pytest.mark.parametrize("given", [32, "32"])
def test_one_for_both(given):
    assert height_and_width("size", given) == (32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("9" * 5000, "size is more than 1,048,576 pixels: give the size that the network was trained on"),
        pytest.param(10**5000, "size is a number of 5001 digits", id="a number of 5,001 digits"),
        ((8, 10**5000), "size is a number of 5001 digits"),
        ("1," * 5000, "size = 1,1,.{36} is neither one number"),
        ((8,), r"size = \(8,\) is neither one number nor a height and a width, such as 32,48"),
        ("8,0", "size = 8,0 makes no image: give at least 1 pixel"),
        ("wide" * 5000, "size = 'wide.*' is not a whole number"),
        ("", "size = '' is not a whole number"),
    ],
)
def test_refused_in_one_sentence(given, message):
    with pytest.raises(InputError, match=message) as error:
        height_and_width("size", given)
    assert len(str(error.value)) < 120


def test_multiples_of_what_the_network_takes():
    assert suited("size", (16, 24), 8) == (16, 24)
    assert suited("size", (3, 5), 1) == (3, 5)
    for size, near in (((33, 24), "32,24"), ((1, 30), "8,32")):
        with pytest.raises(InputError, match=f"does not suit the network, which takes multiples of 8, such as {near}$"):
            suited("size", size, 8)
