"""Networks of torchcfm, against its own class and Euler's loop."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from foreign import torchcfm_wrapper
from recorded import state_for

from epsrt import BundleError, EpsrtError, InputError, Sampler, noise
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.flow import FLOW, Turned
from epsrt_export.families.torchcfm import recognise
from epsrt_export.redraw import redraw

SEED = 5
DIGITS = {"dim": (1, 28, 28), "num_channels": 32, "num_res_blocks": 1}
HEADS = {"num_heads": 1}
UPSAMPLE, NEW = {"num_heads": 2, "num_heads_upsample": 1}, {"num_heads": 2, "use_new_attention_order": True}


def theirs(**changes):
    """Their network, its weights those that their names give."""
    wrapper = torchcfm_wrapper()(**{**DIGITS, **changes}).eval()
    wrapper.load_state_dict(state_for({name: tensor.shape for name, tensor in wrapper.state_dict().items()}))
    return wrapper


@pytest.fixture
def saved(tmp_path):
    def save(content, name="model.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


class TestNetwork:
    @pytest.mark.parametrize(
        ("changes", "options"),
        [
            ({}, {"num_heads": 1}),
            ({"class_cond": True, "num_classes": 10}, {"num_heads": 1}),
            ({"num_heads": 4, "num_head_channels": 8, "attention_resolutions": "14"}, {"num_head_channels": 8}),
            ({"dim": (3, 32, 32), "channel_mult": [1, 2, 2, 2], "num_res_blocks": 2, "num_heads": 4}, {"num_heads": 4}),
            ({"dim": (3, 16, 32), "channel_mult": [1, 2], "resblock_updown": True}, {"num_heads": 1}),
            ({"use_scale_shift_norm": True, **UPSAMPLE}, UPSAMPLE),
            ({"learn_sigma": True, **NEW}, NEW),
        ],
        ids=lambda value: ",".join(value) or "default",
    )  # fmt: skip
    def test_equals_theirs(self, saved, changes, options):
        reference = theirs(**changes)
        channels, height, width = changes.get("dim", DIGITS["dim"])
        source = families.load("torchcfm", saved(reference.state_dict()), image_size=f"{height},{width}", **options)
        assert source.shape == (channels, height, width)
        x = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
        s = torch.tensor([0.1, 0.5, 1.0])
        label = (torch.tensor([0, 9, 4]),) if changes.get("class_cond") else ()
        with torch.no_grad():
            out, want = source.network(x, 1000 * s, *label), -reference(1 - s, x, *label)[:, :channels]
        assert 0.1 < float(want.std()) < 5
        assert float((out - want).norm() / want.norm()) < 1e-6


def test_samples(saved, tmp_path):
    """Euler's twenty steps along their network, and ours of the bundle."""
    reference = theirs(dim=(3, 16, 16), channel_mult=[1, 2], class_cond=True, num_classes=4, attention_resolutions="8")
    turned = Turned(ADMUNet(ADMConfig(16, 3, 32, (1, 2), 1, (8,), 1, num_classes=4, use_scale_shift_norm=False)), 3)
    redraw(turned, FLOW, (3, 16, 16), classes=4, prediction="velocity")
    reference.load_state_dict(turned.network.state_dict())
    source = families.load("torchcfm", saved(reference.state_dict()), image_size=16, num_heads=1)
    bundle = export(source, tmp_path / "some.epsrt", precisions=("fp32",), max_batch=4)
    labels = [0, 3, 1]
    x = torch.from_numpy(noise.normals(SEED, range(3), noise.START, 0, 768).reshape(3, 3, 16, 16))
    with torch.no_grad():
        for t in torch.arange(20) / 20:
            x = x + reference(t, x, torch.tensor(labels)) / 20
    with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
        ours = sampler.sample(3, seed=SEED, labels=labels, method="flow-euler", steps=20)
    x = x.numpy()
    assert 0.2 < x.std() < 2
    assert np.abs(x[0] - x[1]).max() > 0.1
    assert worst_psnr(ours, x, (float(x.min()), float(x.max()))) > 110


class TestSources:
    def test_of_a_state_dict(self, saved):
        path = saved(theirs(class_cond=True, num_classes=10).state_dict())
        source = families.load("torchcfm", path, image_size=28, num_heads=1)
        assert (source.shape, source.classes, source.null_label) == ((1, 28, 28), 10, None)
        assert (source.prediction, source.clip, source.variance) == ("velocity", None, None)
        assert (source.schedule, source.sampling) == (FLOW, Sampling("flow-heun", 50))
        assert (source.family, source.name, source.sha256) == ("torchcfm", "model.pt", sha256(path))
        assert source.kind == "epsrt_export.families.adm.ADMUNet"
        assert source.config["channel_mult"] == (1, 2, 2)

    def test_what_their_training_saves(self, saved):
        plain = theirs().state_dict()
        average = OrderedDict((name, 2 * tensor) for name, tensor in plain.items())
        sched = {"base_lrs": [2e-4], "last_epoch": 400000}
        content = {"net_model": plain, "ema_model": average, "sched": sched, "optim": {"state": {}}, "step": 400000}
        path = saved(content, "cfm_cifar10_weights_step_400000.pt")
        for ema, scale in ((None, 2), (True, 2), (False, 1)):
            source = families.load("torchcfm", path, image_size=28, num_heads=1, ema=ema)
            assert torch.equal(source.network.network.out[2].bias, scale * plain["out.2.bias"])
        assert source.training == {"steps": 400000}
        assert any("plain" in note for note in source.notes)

    def test_latents(self, saved):
        path = saved(theirs(dim=(4, 28, 28)).state_dict())
        source = families.load("torchcfm", path, image_size=28, num_heads=1)
        assert (source.latents, source.value_range) == (True, (-4.0, 4.0))
        assert any("taken for an autoencoder's latents" in note for note in source.notes)
        assert not families.load("torchcfm", path, image_size=28, num_heads=1, latents=False).latents

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (HEADS, "does not say image_size: give the last two of the wrapper's dim, such as image_size=32"),
            ({"image_size": 28}, "does not say num_heads: give num_heads or num_head_channels as the wrapper had them"),
            ({"image_size": 30, **HEADS}, "image_size = 30,30 does not suit the network, which takes multiples of 4"),
            ({"image_size": "30,28", **HEADS}, "image_size = 30,28 does not suit the network, which takes"),
            ({"image_size": "28,30", **HEADS}, "image_size = 28,30 does not suit the network, which takes"),
            ({"image_size": 28, "num_heads": 3}, "num_heads = 3 does not divide the 32 channels"),
            ({"image_size": 28, "num_heads": "many"}, "num_heads = 'many' is not a whole number"),
        ],
    )
    def test_options_that_are_refused(self, saved, options, message):
        with pytest.raises(InputError) as error:
            families.load("torchcfm", saved(theirs().state_dict()), **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_other_files(self, saved):
        with pytest.raises(
            BundleError, match="holds no network of this family, which has a tensor time_embed.0.weight"
        ):
            families.load("torchcfm", saved({"net.0.weight": torch.zeros(64, 3)}), image_size=28, num_heads=1)
        first = {**theirs().state_dict(), "input_blocks.0.0.weight": torch.zeros(32, 1, 3)}
        with pytest.raises(EpsrtError, match="of a network for 1-dimensional data"):
            families.load("torchcfm", saved(first), image_size=28, num_heads=1)


class TestRecognised:
    def shapes(self, **changes):
        return {name: tuple(tensor.shape) for name, tensor in theirs(**changes).state_dict().items()}

    def test_their_defaults(self):
        guess = recognise(self.shapes(class_cond=True, num_classes=10), {})
        assert (guess.family, guess.options, list(guess.missing)) == ("torchcfm", {}, ["image_size", "num_heads"])
        assert guess.facts["network"] == "OpenAI's U-Net: 32 channels times 1, 2, 2"
        assert guess.facts["classes"] == "10"

    def test_by_their_training(self):
        shapes = self.shapes(use_scale_shift_norm=True)
        assert recognise(shapes, {"sched": {}, "step": 3}).family == "torchcfm"
        assert recognise(shapes, {}) is None  # guided-diffusion's
