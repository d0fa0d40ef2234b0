"""The runtime's sentences, as a user of the command reads them."""

import pytest

from epsrt_command.wording import in_options, options_of

OPTIONS = {"n": "-n", "x": "--latents"} | {
    name: "--" + name.replace("_", "-")
    for name in ("labels", "first", "strength", "init", "guidance", "guidance_rescale", "classifier", "steps", "known")
}


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("n = 0: ask for at least 1 sample", "-n 0: ask for at least 1 sample"),
        ("draw them in several runs, with first=", "draw them in several runs, with --first"),
        ("give its weight, classifier=, or labels", "give its weight, --classifier, or labels"),
        (
            "guidance weighs a label against none: give labels that are classes",
            "guidance weighs a label against none: give --labels that are classes",
        ),
        ("is unconditional: leave labels out", "is unconditional: leave --labels out"),
        (
            "guidance_rescale is for guided samples: give guidance",
            "--guidance-rescale is for guided samples: give --guidance",
        ),
        ("guidance_rescale = 2.0 is outside [0, 1]", "--guidance-rescale 2.0 is outside [0, 1]"),
        ("2 x images for 3 samples: give one each", "2 --latents images for 3 samples: give one each"),
        ("3 labels for 2 samples: give one each", "3 labels for 2 samples: give one each"),
        (
            "plan 'give labels' begins from noise: give strength",
            "plan 'give labels' begins from noise: give --strength",
        ),
        ("a first = b", "a first = b"),
        ("begins from images: give them as init", "begins from images: give them as --init"),
        ("eta = 2 is outside", "eta = 2 is outside"),  # which this command has not
        ("exports of first=3 and (labels=)", "exports of first=3 and (--labels)"),
    ],
)
def test_names_of_arguments_become_options(sentence, wanted):
    assert in_options(sentence, OPTIONS) == wanted


def test_what_the_user_typed_stays():
    path = "out/steps = 3, give labels, first=.epsrt"
    sentence = f"{path} has no labels: give labels, with first="
    assert (
        in_options(sentence, OPTIONS, ["sample", path, "-n", "3"])
        == f"{path} has no labels: give --labels, with --first"
    )
    assert in_options("steps = 3.epsrt is no bundle", OPTIONS, ["steps = 3.epsrt"]) == "steps = 3.epsrt is no bundle"


def test_options_are_the_subcommands_own():
    import typer

    from epsrt_command.app import app

    commands = typer.main.get_command(app).commands
    found = options_of(commands["sample"])
    assert (found["x"], found["n"], found["first"]) == ("--latents", "-n", "--first")
    assert found["guidance_rescale"] == "--guidance-rescale"
    assert not {"clip", "more", "trust_engines", "as_json", "bundle"} & set(found)
    assert "first" not in options_of(commands["interpolate"])
    assert options_of(commands["inspect"]) == {}
    assert in_options("give a bundle", {}) == "give a bundle"
