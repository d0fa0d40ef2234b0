"""What `epsrt inspect` says of files that are no bundle: the family, how they lie there, and a command that works."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler
from safetensors.torch import save_file

from epsrt import BundleError
from epsrt_export import families
from epsrt_export.families import look as look_module
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.look import RECOGNISERS, look
from epsrt_export.families.lucidrains_unet import theirs
from nets import diffusers_unet


def adm(**more):
    kind = {"image_size": 32, "num_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 1}
    return ADMUNet(ADMConfig(**kind, attention_resolutions=(16,), **more))


def diffusion():
    package = theirs()
    unet = package.Unet(dim=16, dim_mults=(1, 2), flash_attn=False)
    return package.GaussianDiffusion(unet, image_size=8, timesteps=100)


def under(prefix, module):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def facts(seen):
    return dict(seen.facts)


def asked(seen):
    """Family and options of the command that it prints."""
    words = shlex.split(seen.command)
    sets = [words[i + 1].partition("=")[::2] for i, word in enumerate(words) if word == "--set"]
    return words[words.index("--from") + 1], dict(sets)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look") / "some"
    DDPMPipeline(diffusers_unet(T=40), DDPMScheduler(num_train_timesteps=40, beta_end=0.3)).save_pretrained(folder)
    return folder


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (lambda: adm().state_dict(), {}),
            (lambda: under("module._orig_mod.", adm()), {"prefix": "'_orig_mod.' and 'module.', which"}),
            (
                lambda: {"epoch": 3, "model": under("", adm()), "ema": under("", adm())},
                {"weights": "averaged (EMA), and plain ones: --ema or --no-ema", "beside them": "epoch = 3"},
            ),
        ],
    )
    def test_the_command_loads_it_when_what_is_missing_is_told(self, tmp_path, content, said):
        torch.save(content(), tmp_path / "a b.pt")
        seen = look(tmp_path / "a b.pt")
        family, options = asked(seen)
        assert family == "improved-diffusion"
        assert {name for name, _ in seen.missing} >= {"num_heads", "diffusion_steps", "image_size"}
        assert seen.problem == ""
        for name, words in said.items():
            assert facts(seen)[name].startswith(words)
        told = {"num_heads": 1, "diffusion_steps": 100, "image_size": 32, "attention_resolutions": "16"}
        options = {name: value for name, value in options.items() if value != "…"}
        families.load(family, tmp_path / "a b.pt", **options, **told)

    @pytest.mark.parametrize("kind", ["diffusion", "trainer", "unet"])
    def test_of_lucidrains(self, tmp_path, kind):
        whole = diffusion()
        content = {
            "diffusion": whole.state_dict(),
            "trainer": {"step": 9, "model": whole.state_dict(), "ema": under("ema_model.", whole), "version": "2.3"},
            "unet": whole.model.state_dict(),
        }[kind]
        torch.save(content, tmp_path / "x.pt")
        seen = look(tmp_path / "x.pt")
        family, options = asked(seen)
        assert family == "denoising-diffusion-pytorch"
        assert ("beta_schedule" in options) == (kind == "unet")
        assert facts(seen).get("weights", "").startswith("averaged") == (kind == "trainer")

    def test_a_unet_of_diffusers_is_looked_at_with_its_folder(self, saved, tmp_path):
        file = saved / "unet" / "diffusion_pytorch_model.safetensors"
        assert shlex.split(look(file).command)[:4] == ["epsrt", "export", "--from", "diffusers"]
        torch.save(diffusers_unet(T=40).state_dict(), tmp_path / "alone.pt")
        assert "it lacks config.json and scheduler_config.json" in look(tmp_path / "alone.pt").problem

    def test_headers_alone_are_read(self, tmp_path, monkeypatch):
        save_file({name: tensor.half() for name, tensor in adm().state_dict().items()}, tmp_path / "x.safetensors")
        monkeypatch.setattr(look_module, "load_file", None, raising=False)
        monkeypatch.setattr("epsrt_export.families.tensorfile.load_file", None)
        seen = look(tmp_path / "x.safetensors")
        assert "numbers in float16" in facts(seen)["the file"]
        assert asked(seen)[0] == "improved-diffusion"

    def test_a_checkpoint_of_the_trainer(self, checkpoint_path):
        assert look(checkpoint_path).command == f"epsrt export {checkpoint_path} {checkpoint_path.stem}.epsrt"

    def test_what_nobody_knows(self, tmp_path):
        torch.save({"a.weight": torch.zeros(3), "n": np.float64(2)}, tmp_path / "x.pt")
        seen = look(tmp_path / "x.pt")
        assert "no family of --from has such tensors; its first tensors are a.weight" in seen.problem
        assert facts(seen)["beside them"] == "n = 2.0"
        torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
        with pytest.raises(BundleError, match="holds torch.nn.modules.linear.Linear, which loading would run"):
            look(tmp_path / "module.pt")
        (tmp_path / "x.txt").write_text("hello")
        with pytest.raises(BundleError, match="x.txt is no file of weights, of torch.save or safetensors: give one"):
            look(tmp_path / "x.txt")
        with pytest.raises(BundleError, match="none does not exist"):
            look(tmp_path / "none")

    def test_averages_without_names_are_seen(self, tmp_path):
        shadow = list(adm().parameters())
        torch.save({"model": under("", adm()), "ema": {"shadow_params": shadow}}, tmp_path / "x.pt")
        assert facts(look(tmp_path / "x.pt"))["weights"] == "averaged (EMA), and plain ones: --ema or --no-ema"

    @pytest.mark.parametrize("anchor", ["init_conv.weight", "conv_in.weight", "input_blocks.0.0.weight", "pos_embed"])
    def test_odd_tensors_make_no_guess_and_no_traceback(self, tmp_path, anchor):
        others = (
            "final_conv.weight",
            "time_mlp.3.weight",
            "output_blocks.0",
            "down_blocks.x.y",
            "out.2",
            "downs.e.weight",
        )
        odd = {anchor: torch.zeros(3, 3, 3, 3), "time_embed.0.weight": torch.zeros(()), "\ud800": torch.zeros(1)}
        torch.save({**odd, **{name: torch.zeros(()) for name in others}, 0: torch.zeros(1)}, tmp_path / "x.pt")
        seen = look(tmp_path / "x.pt")
        assert seen.problem
        str(seen).encode()

    def test_many_names_take_no_time(self, tmp_path):
        torch.save({f"a{i}.b{i}.w": torch.zeros(()) for i in range(3000)}, tmp_path / "x.pt")
        assert "no family" in look(tmp_path / "x.pt").problem

    def test_every_family_has_a_recogniser(self):
        modules = {module for module, _ in families.FAMILIES.values()} - {"checkpoint", "diffusers"}
        assert modules == set(RECOGNISERS) - {"diffusers_folder"}


class TestFolders:
    def test_of_diffusers(self, saved, tmp_path):
        seen = look(saved)
        assert seen.command == f"epsrt export --from diffusers {saved} some.epsrt"
        assert facts(seen)["network"] == "UNet2DModel, in_channels = 3, out_channels = 3, sample_size = 8"
        assert facts(seen)["noise"] == "DDPMScheduler, linear, T = 40, predicts epsilon"

    def test_the_folder_one_is_in_gives_the_bundle_its_name(self, saved, monkeypatch):
        monkeypatch.chdir(saved)
        assert look(".").command == "epsrt export --from diffusers . some.epsrt"

    def test_what_is_in_the_way_is_said_after_what_is_known(self, saved, copy_of):
        folder = copy_of(saved)
        PNDMScheduler().save_pretrained(folder / "scheduler")
        seen = look(folder)
        assert "PNDMScheduler is not among" in seen.problem
        assert "UNet2DModel" in facts(seen)["network"]
        assert seen.command == ""

    def test_others_lead_to_what_they_hold(self, tmp_path, saved):
        assert "look at a file of weights, or the folder that holds them" in look(tmp_path).problem
        assert f"look at a file of weights: epsrt inspect {saved}" in look(saved.parent).problem
        (tmp_path / "x.pt").write_bytes(b"")
        assert f"epsrt inspect {tmp_path / 'x.pt'}" in look(tmp_path).problem


def test_the_command(saved, copy_of):
    def inspect(*arguments, code):
        command = [sys.executable, "-c", "from epsrt_command import main; main()", "inspect", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    assert f"\nepsrt export --from diffusers {saved} some.epsrt\n" in inspect(saved, code=0).stdout
    told = json.loads(inspect(saved, "--json", code=0).stdout)
    assert told["command"].startswith("epsrt export --from diffusers")
    folder = copy_of(saved)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "unet" / "config.json").unlink()
    done = inspect(folder, code=1)
    assert "config.json is missing" in done.stderr
    assert "files" in done.stdout
