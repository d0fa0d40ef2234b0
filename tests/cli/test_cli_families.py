"""epsrt export --from: other people's files by the command, sampled and shown as their owners know them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal, run
from diffusers import DDIMPipeline, DDIMScheduler

from epsrt import Bundle
from epsrt.manifest import Sampling
from epsrt_export.families import FAMILIES
from nets import diffusers_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "my-ddim"
    scheduler = DDIMScheduler(num_train_timesteps=100, beta_end=0.2, set_alpha_to_one=False, steps_offset=1)
    small = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    DDIMPipeline(diffusers_unet(T=100, num_class_embeds=4, **small), scheduler).save_pretrained(path)
    return path


def test_a_pipelines_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.epsrt"
    run("export", "--from", "diffusers", folder, out, "--set", "null_label=3", "--precision", "fp32", "--max-batch", 4)
    m = Bundle.open(out).manifest
    assert (m.classes, m.null_label) == (3, 3)
    options = {"compatible": "diffusers", "steps_offset": 1, "set_alpha_to_one": False}
    assert m.sampling == Sampling("ddim", 50, "leading", options)
    text = run("inspect", out).stdout
    for words in (
        "diffusers.UNet2DModel",
        "my-ddim/unet/diffusion_pytorch_model.safetensors, diffusers 0.",
        m.provenance.source_sha256,
        "config: network",
        "block_out_channels [16]",
        "config: scheduler",
        "set_alpha_to_one False",
        "ddim, 50 steps, spacing leading",
    ):
        assert words in text
    planned = json.loads(run("plan", "--bundle", out, "--json").stdout)
    assert planned["method"] == "ddim"
    assert planned["timesteps"] == [1.0 + 2 * i for i in range(50)][::-1]
    run("sample", out, "-n", 2, "--labels", 1, "--out", tmp_path / "theirs.npz")
    run(
        "sample",
        out,
        "-n",
        2,
        "--labels",
        1,
        "--out",
        tmp_path / "same.npz",
        "--method",
        "ddim",
        "--steps",
        50,
        "--spacing",
        "leading",
        "--set",
        "steps_offset=1",
        "--set",
        "compatible=diffusers",
        "--set",
        "set_alpha_to_one=false",
    )
    run("sample", out, "-n", 2, "--labels", 1, "--out", tmp_path / "ours.npz", "--spacing", "linspace")
    theirs, same, ours = (np.load(tmp_path / f"{name}.npz")["samples"] for name in ("theirs", "same", "ours"))
    np.testing.assert_array_equal(theirs, same)
    assert np.abs(theirs - ours).max() > 1e-3


def test_what_is_refused_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.epsrt"
    assert "family 'difusers' is unknown: did you mean diffusers" in refusal(
        "export", "--from", "difusers", folder, out
    )
    sentence = refusal("export", "--from", "diffusers", folder, out, "--set", "nul_label=3")
    assert "diffusers takes no option 'nul_label': did you mean null_label" in sentence
    assert "is not of the form NAME=VALUE" in refusal(
        "export", "--from", "diffusers", folder, out, "--set", "null_label"
    )
    assert "null_label was given twice" in refusal(
        "export", "--from", "diffusers", folder, out, "-s", "null_label=3", "-s", "null_label=2"
    )
    assert "epsrt takes no option 'null_label': it takes none" in refusal("export", folder, out, "-s", "null_label=3")
    assert "a directory" in refusal("export", folder, out)
    pickle = tmp_path / "ema.pt"
    torch.save({"model": diffusers_unet()}, pickle)
    for family in ("improved-diffusion", "guided-diffusion"):
        assert "ema.pt" in refusal("export", "--from", family, pickle, out)
    assert not out.exists()


def test_the_commands_list_is_the_registrys() -> None:
    from epsrt_command.commands.export import FAMILIES as named

    assert list(named) == list(FAMILIES)
