"""Networks of facebookresearch/DiT and willisma/SiT, against what their owners' code gave.

tests/data/foreign/dit.npz was recorded with facebookresearch/DiT at commit ed81ce2, and sit.npz with willisma/SiT at
commit 947f95b (timm 1.0.31, torchdiffeq 0.2.5): two networks each, `four` and `three` of so many channels. Last layers,
fitted to what a network predicts, are in the files; the other weights are `weights_for`. The noise is epsrt's, of seed
5. `three` is guided by 4: the owners guide three channels.
"""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from recorded import recorded, state_for

from epsrt import BundleError, InputError, Sampler, Schedule, noise
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families.dit import PUBLISHED, recognise
from epsrt_export.families.dit_network import DiTNetwork, DiTShape
from epsrt_export.precision import half_copy

SEED, LABELS = 5, [0, 3, 1]
SMALL = DiTShape(4, (8, 8), 2, 32, 2, 2, 128, 6, True)
FAMILIES = pytest.mark.parametrize("family", ["dit", "sit"])
NAMES = pytest.mark.parametrize("name", ["four", "three"])


def of_record(family, name):
    """The state dict of a network in a record, and what the owner's code gave for it."""
    record = {k.removeprefix(f"{name}."): v for k, v in recorded(family).items() if k.startswith(f"{name}.")}
    words = [line.split() for line in record["shapes"]]
    state = state_for({tensor: tuple(map(int, shape)) for tensor, *shape in words})
    state["final_layer.linear.weight"] = torch.from_numpy(record["final_layer.linear.weight"])
    return state, record


def state_of(shape=SMALL, **changes):
    with torch.device("meta"):
        network = DiTNetwork(dataclasses.replace(shape, **changes))
    return state_for({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})


@pytest.fixture
def saved(tmp_path):
    def save(content, name="some.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def psnr(ours, theirs):
    return worst_psnr(ours, theirs, (float(theirs.min()), float(theirs.max())))


class TestAgainstTheirs:
    @FAMILIES
    @NAMES
    def test_output(self, saved, family, name):
        state, record = of_record(family, name)
        source = families.load(family, saved(state), num_heads=2)
        x = noise.normals(SEED, range(3), noise.START, 0, int(np.prod(source.shape))).reshape(3, *source.shape)
        t, label = torch.from_numpy(record["t"]), torch.tensor([0, 3, 5])
        with torch.no_grad():
            if family == "dit":
                out = source.network(torch.from_numpy(x), t, label)
            else:  # turned round
                out = -source.network(torch.from_numpy(x), 1000 * (1 - t), label)
        want = torch.from_numpy(record["output"])
        assert 0.3 < float(want.std()) < 3
        assert float((out - want).norm() / want.norm()) < 1e-6

    @FAMILIES
    @NAMES
    def test_samples(self, saved, tmp_path, family, name):
        """Through the gate, and by their own loop: ten of DiT's respaced steps, twenty of SiT's Euler."""
        state, record = of_record(family, name)
        source = families.load(family, saved(state), num_heads=2, latents=True)
        bundle = export(source, tmp_path / "some.epsrt", precisions=("fp32",), max_batch=4)
        how = {"spacing": "10", "steps": None} if family == "dit" else {"method": "flow-euler", "steps": 20}
        guidance = 4.0 if name == "three" else 1.0
        theirs = record["samples" if family == "dit" else "euler"]
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            ours = sampler.sample(3, seed=SEED, labels=LABELS, guidance=guidance, **how)
            if family == "sit":  # as nobody told it otherwise, but for the guidance: theirs is adaptive
                usual = sampler.sample(3, seed=SEED, labels=LABELS, guidance=guidance)
                assert psnr(usual, record["dopri5"]) > 60
        assert theirs.std() > 0.5
        assert np.abs(theirs[0] - theirs[1]).max() > 0.1
        assert psnr(ours, theirs) > 120

    def test_half_copy_computes_the_same(self):
        network = DiTNetwork(SMALL).eval()
        network.load_state_dict(state_of())
        x, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 321.0, 999.0]), torch.tensor([0, 3, 5])
        with torch.no_grad():
            out, half = network(x, t, label), half_copy(network)(x.half(), t, label)
        assert half.dtype == torch.float16
        assert float((half.float() - out).norm() / out.norm()) < 3e-3

    @pytest.mark.parametrize("name", sorted(PUBLISHED.values()))
    def test_published_sizes(self, name):
        """The papers' parameters, in millions (arXiv 2212.09748, table 4), for patches of 2."""
        (hidden, depth), heads = next(k for k, v in PUBLISHED.items() if v == name), name[1]
        with torch.device("meta"):
            network = DiTNetwork(DiTShape(4, (32, 32), 2, hidden, depth, heads, 4 * hidden, 1001, True))
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        assert round(millions) == {"S": 33, "B": 131, "L": 458, "XL": 675}[name[0]]


class TestSources:
    def test_of_dit(self, saved):
        path = saved(state_of())
        source = families.load("dit", path, num_heads=2)
        assert (source.shape, source.classes, source.null_label) == ((4, 8, 8), 5, 5)
        assert (source.prediction, source.variance, source.clip) == ("epsilon", "learned_range", None)
        assert (source.latents, source.value_range) == (True, (-4.0, 4.0))
        assert source.schedule == Schedule("linear", 1000)
        assert source.sampling == Sampling("ddpm", None, "250", {}, guidance=4.0)
        assert (source.family, source.name, source.sha256) == ("dit", "some.pt", sha256(path))
        assert source.config["hidden_size"] == 32
        assert not source.network.training

    def test_of_sit(self, saved):
        source = families.load("sit", saved(state_of()), num_heads=2)
        assert (source.prediction, source.variance, source.clip) == ("velocity", None, None)
        assert (source.schedule.kind, source.null_label, source.latents) == ("flow", 5, True)
        assert source.sampling == Sampling("flow-heun", 50, guidance=4.0)
        assert source.kind == "epsrt_export.families.dit_network.DiTNetwork"

    def test_without_a_learned_sigma(self, saved):
        path = saved(state_of(learn_sigma=False))
        source = families.load("dit", path, num_heads=2)
        assert (source.variance, source.sampling.options) == (None, {"variance": "fixed_large"})

    def test_heads_of_the_papers_are_known(self, saved):
        path = saved(state_of(hidden_size=384, depth=12, mlp_size=64))
        assert families.load("dit", path).config["num_heads"] == 6
        assert families.load("dit", path, num_heads=3).config["num_heads"] == 3

    @FAMILIES
    def test_what_their_training_saves(self, saved, family):
        """Whose args are an argparse.Namespace; the averages are taken unless told otherwise."""
        plain, average = state_of(), {name: 2 * tensor for name, tensor in state_of().items()}
        args = argparse.Namespace(model="DiT-S/2", image_size=64, num_classes=5)
        content = {"model": plain, "ema": average, "opt": {"state": {}, "param_groups": []}, "args": args}
        path = saved(content, "0050000.pt")
        found = {ema: families.load(family, path, num_heads=2, ema=ema) for ema in (None, True, False)}
        for ema, source in found.items():
            state = source.network.state_dict()
            name = next(name for name in state if name.endswith("pos_embed"))
            assert torch.equal(state[name], (plain if ema is False else average)["pos_embed"])
        assert found[None].training == {"model": "DiT-S/2", "image_size": 64, "num_classes": 5}
        assert "averaged" in found[None].notes[0]
        assert "plain" in found[False].notes[0]

    def test_prefixes(self, saved):
        wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in state_of().items()}
        source = families.load("dit", saved(wrapped), num_heads=2)
        assert torch.equal(source.network.state_dict()["pos_embed"], state_of()["pos_embed"])
        assert any("taken off" in note for note in source.notes)

    def test_label_dropout(self, saved):
        path = saved(state_of())
        source = families.load("dit", path, num_heads=2, num_classes=6)
        assert (source.classes, source.null_label) == (6, None)
        assert families.load("dit", path, num_heads=2, num_classes=5).null_label == 5

    def test_pictures(self, saved):
        """One or three channels are taken for pictures, unless latents says otherwise."""
        path = saved(state_of(in_channels=3))
        assert families.load("dit", path, num_heads=2).value_range == (-1.0, 1.0)
        assert not families.load("dit", path, num_heads=2).latents
        assert families.load("dit", path, num_heads=2, latents=True).latents

    def test_a_size_that_is_not_square(self, saved):
        path = saved(state_of(size=(4, 12)))
        with pytest.raises(InputError, match="has 12 positions, no square: give its height and width, such as size=32"):
            families.load("dit", path, num_heads=2)
        source = families.load("dit", path, num_heads=2, size="4,12")
        assert source.shape == (4, 4, 12)
        reference = DiTNetwork(dataclasses.replace(SMALL, size=(4, 12))).eval()
        reference.load_state_dict(state_of(size=(4, 12)))
        x, t, label = torch.randn(2, 4, 4, 12), torch.zeros(2), torch.tensor([0, 5])
        with torch.no_grad():
            assert torch.equal(source.network(x, t, label), reference(x, t, label))


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "has 2 blocks of 32 channels, none of S (384 × 12), B (768 × 12), L (1024 × 24), XL (1152 × 28), and"),
            ({}, "weights do not tell num_heads: give that of the training, such as num_heads=6"),
            ({"num_heads": 3}, "num_heads = 3 does not divide the hidden size of 32"),
            ({"num_heads": 2, "num_classes": 4}, "whose table of labels has 6 rows: give 5, or 6 if it was trained"),
            ({"num_heads": 2, "size": "8,16"}, "size = 8,16 does not suit"),
            ({"num_heads": 2, "size": "8,16"}, "16 patches of 2 × 2; leave size out for 8,8"),
            ({"num_heads": 2, "size": 256}, "size = 256,256 does not suit"),
            ({"num_heads": 2, "size": "big"}, "size = 'big' is not a whole number"),
            ({"num_heads": 2, "ema": True}, "ema = true, but"),
            ({"num_heads": 2, "heads": 2}, "takes no option 'heads': did you mean num_heads"),
        ],
    )
    @FAMILIES
    def test_options(self, saved, family, options, message):
        with pytest.raises(InputError) as error:
            families.load(family, saved(state_of()), **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"path_type": "GVP"}, "path_type = GVP is not offered, only Linear: export the network from Python"),
            ({"path_type": "VP"}, "path_type = VP is not offered"),
            ({"prediction": "score"}, "prediction = score is not offered, only velocity"),
            ({"path_type": "linear"}, "path_type 'linear' is unknown: did you mean Linear"),
        ],
    )
    def test_other_paths_of_sit(self, saved, options, message):
        with pytest.raises(InputError) as error:
            families.load("sit", saved(state_of()), num_heads=2, **options)
        assert message in str(error.value)

    def test_a_path_that_the_training_says(self, saved):
        args = argparse.Namespace(path_type="GVP", prediction="velocity")
        path = saved({"ema": state_of(), "args": args})
        with pytest.raises(InputError, match="path_type = GVP is not offered"):
            families.load("sit", path, num_heads=2)
        assert families.load("sit", path, num_heads=2, path_type="Linear").prediction == "velocity"

    def test_other_networks(self, saved):
        with pytest.raises(BundleError, match="holds no network of this family, which has a tensor x_embedder.proj"):
            families.load("dit", saved({"conv_in.weight": torch.zeros(32, 3, 3, 3)}))
        more = {**state_of(), "blocks.0.attn.q_norm.weight": torch.ones(16)}
        with pytest.raises(BundleError, match=r"does not fit: it has a tensor blocks.0.attn.q_norm.weight"):
            families.load("dit", saved(more), num_heads=2)
        linear = {**state_of(), "x_embedder.proj.weight": torch.zeros(32, 16)}
        with pytest.raises(BundleError, match=r"x_embedder.proj.weight has shape \[32, 16\], and 4 axes in DiT"):
            families.load("dit", saved(linear), num_heads=2)
        odd = {
            **state_of(),
            "final_layer.linear.weight": torch.zeros(48, 32),
            "final_layer.linear.bias": torch.ones(48),
        }
        with pytest.raises(InputError, match="takes 4 channels and returns 12: neither as many nor twice"):
            families.load("dit", saved(odd), num_heads=2)


class TestRecognised:
    def shapes(self, **changes):
        return {name: tuple(tensor.shape) for name, tensor in state_of(**changes).items()}

    def test_a_published_size(self):
        guess = recognise(self.shapes(hidden_size=384, depth=12), {})
        assert (guess.family, guess.options, guess.missing) == ("dit", {}, {})
        assert guess.facts["network"] == "S/2: 12 blocks of 384 channels, patches of 2"
        assert guess.facts["input"] == "4 channels, 8 × 8"
        assert guess.facts["classes"] == '5, and a row for "none"'
        assert "--from sit" in guess.facts["DiT or SiT"]

    def test_another_size(self):
        guess = recognise(self.shapes(size=(4, 12)), {"args": argparse.Namespace(model="mine")})
        assert list(guess.missing) == ["num_heads", "size"]
        assert "DiT or SiT" not in guess.facts

    def test_sit_by_its_arguments(self):
        assert recognise(self.shapes(), {"args": argparse.Namespace(path_type="Linear")}).family == "sit"

    def test_others(self):
        assert recognise({"conv_in.weight": (32, 3, 3, 3)}, {}) is None
        assert recognise({**self.shapes(), "pos_embed": (16, 32)}, {}) is None
