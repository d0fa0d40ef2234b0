"""The command's reference: made from its help, with nothing left out."""

import html
import re
import subprocess
import sys

import typer

from epsrt_command.app import app
from epsrt_command.commands import bench_compare
from epsrt_command.reference import reference


def test_every_subcommand_with_every_option_argument_and_example():
    root = typer.main.get_command(app)
    commands = {f"epsrt {name}": command for name, command in root.commands.items()}
    commands["epsrt bench compare"] = bench_compare.command()
    sections = dict(part.split("`\n", 1) for part in html.unescape(reference()).split("\n## `")[1:])
    assert sorted(sections) == sorted(commands)
    for name, command in commands.items():
        text = sections[name]
        usage = text.split("```text\n")[1].split("\n")[0]
        assert " ".join(command.help.split()) in " ".join(text.split())
        for parameter in command.params:
            assert " ".join(parameter.help.split()) in text
            if parameter.param_type_name == "option":
                names = re.findall("<code>(.*)</code>", text)
                for word in (*parameter.opts, *parameter.secondary_opts):
                    assert any(word in re.split("[, /]+", found) for found in names)
            else:
                assert parameter.metavar in usage
        for example in command.epilog.splitlines()[2::2]:
            assert example in text


def test_defaults_are_told():
    rows = {
        line.split("</code>")[0].removeprefix("| <code>"): line.split(" | ")[-1].removesuffix(" |")
        for line in html.unescape(reference().split("## `epsrt sample`")[1].split("## `")[0]).splitlines()
        if line.startswith("| <code>")
    }
    assert rows["--seed <int>"] == "0"
    assert rows["-o, --out <path>"] == "samples.png"
    assert rows["--engine <str>"] == "auto"
    assert rows["--steps <int>"].strip() == ""


def test_it_is_printed():
    done = subprocess.run([sys.executable, "-m", "epsrt_command.reference"], capture_output=True, text=True, check=True)
    assert done.stdout == reference()
