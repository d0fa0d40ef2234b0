"""Networks of NVlabs/edm2: equal to what the owner's code gave, and told by their own tensors.

tests/data/foreign/edm2.npz is of github.com/NVlabs/edm2 at 4bf8162: outputs of its Precond, made small, with weights of
recorded.py, and images of its edm_sampler from epsrt's noise of seed 7, with its defaults.
"""

import json
import pickle

import pytest
import torch
from recorded import denoised, recorded, taken_out, weights_for

from epsrt import BundleError, EpsrtError, Sampler, Schedule
from epsrt.manifest import Sampling
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt_export import export
from epsrt_export.families import edm2, load
from epsrt_export.precision import half_copy

RECORD = recorded("edm2")
LABELS = (1, 3)


def init_of(case):
    return json.loads(str(RECORD[f"{case}.init"]))


def state_of(case):
    """What net.state_dict() gave. Inference divides weights by their norms, so these are three times as large."""
    state = {}
    for name, shape in json.loads(str(RECORD[f"{case}.shapes"])).items():
        if name.endswith("_gain"):
            state[name] = torch.tensor(1.0 if name.endswith("out_gain") else 0.7)
        else:
            scale = 60 if name.endswith("freqs") else 3 if name.endswith("weight") else 1
            state[name] = weights_for(name, shape) * scale
    return state


@pytest.fixture
def saved(tmp_path):
    def save(case="latents", init=(), state=()):
        weights = {name: value for name, value in {**state_of(case), **dict(state)}.items() if value is not None}
        torch.save({"init": {**init_of(case), **dict(init)}, "weights": weights}, tmp_path / "edm2.pt")
        return tmp_path / "edm2.pt"

    return save


@pytest.mark.parametrize("case", ["latents", "uncond"])
def test_networks_are_the_owners(saved, case):
    source = load("edm2", saved(case))
    for i, label in enumerate(LABELS):
        out = denoised(source, RECORD[f"{case}.x"][i : i + 1], RECORD[f"{case}.sigma"][i], label)
        assert relative_l2(out, RECORD[f"{case}.D"][i : i + 1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["latents", "uncond"])
def test_images_are_the_owners(saved, tmp_path, case):
    """By 32 steps of Heun, through export and Sampler."""
    source = load("edm2", saved(case))
    export(source, tmp_path / "x.epsrt", precisions=("fp32",), max_batch=2)
    with Sampler.open(tmp_path / "x.epsrt", "onnxruntime", threads=1) as sampler:
        images = sampler.sample(2, seed=7, **({"labels": LABELS} if source.classes else {}))
    want = RECORD[f"{case}.sample"]
    assert worst_psnr(images, want, (float(want.min()), float(want.max()))) > 100


class TestSources:
    def test_a_source_says_all(self, saved):
        source = load("edm2", saved())
        assert (source.prediction, source.sigma_data, source.clip) == ("edm", 0.5, None)
        assert (source.shape, source.classes, source.null_label, source.latents) == ((4, 8, 8), 5, None, True)
        assert source.schedule == Schedule("ve", 1000, sigma_min=0.002, sigma_max=80.0)
        assert source.sampling == Sampling("heun", 32, "karras", {"sigma_min": 0.002, "sigma_max": 80.0})
        assert (source.family, source.origin) == ("edm2", "training.networks_edm2.Precond")
        said = " ".join(source.notes)
        assert "StabilityVAEEncoder" in said
        assert "guides by a second network" in said
        assert not source.network.training
        assert load("edm2", saved(), size="8,16").shape == (4, 8, 16)

    def test_of_pixels(self, saved):
        source = load("edm2", saved("uncond"))
        assert (source.shape, source.classes, source.latents, source.sigma_data) == ((3, 8, 8), 0, False, 0.4)
        assert (source.config["residual"], source.config["taps"]) == (0.4, (1, 3, 3, 1))
        assert load("edm2", saved("uncond", {"clip_act": None})).network.config.clip == float("inf")

    @pytest.mark.parametrize("prefix", ["unet.", ""])
    def test_a_bare_state_dict(self, saved, tmp_path, prefix):
        state = {name: value for name, value in state_of("latents").items() if name.startswith("unet.")}
        torch.save({prefix + name.removeprefix("unet."): value for name, value in state.items()}, tmp_path / "bare.pt")
        bare = load("edm2", tmp_path / "bare.pt", channels_per_head=16)
        x, t, label = torch.ones(1, 4, 8, 8), torch.ones(1), torch.tensor([2])
        assert torch.equal(bare.network(x, t, label), load("edm2", saved()).network(x, t, label))
        assert any("res_balance=0.3" in note and "channels_per_head" not in note for note in bare.notes)

    @pytest.mark.parametrize("whole", [True, False])
    def test_averages_without_names(self, tmp_path, whole):
        """They stand for the parameters, in their order: of the Precond with those of its uncertainty, or the UNet."""
        state = state_of("latents")
        buffers = ("freqs", "phases")
        shadow = [
            2 * tensor
            for name, tensor in state.items()
            if not name.endswith(buffers) and (whole or name.startswith("unet."))
        ]
        doubled = {name: tensor if name.endswith(buffers) else 2 * tensor for name, tensor in state.items()}
        torch.save({"net": state, "ema": {"shadow_params": shadow}}, tmp_path / "x.pt")
        torch.save(doubled, tmp_path / "doubled.pt")
        torch.save({"net": state, "ema": {"shadow_params": shadow[2:]}}, tmp_path / "less.pt")
        x, t, label = torch.ones(1, 4, 8, 8), torch.ones(1), torch.tensor([2])
        found, want, plain = (
            load("edm2", tmp_path / name, ema=ema, channels_per_head=16).network(x, t, label)
            for name, ema in (("x.pt", None), ("doubled.pt", None), ("x.pt", False))
        )
        assert torch.equal(found, want)
        assert not torch.allclose(found, plain)
        with pytest.raises(BundleError, match=r"its shadow_params are \d+ tensors without names"):
            load("edm2", tmp_path / "less.pt", channels_per_head=16)

    def test_half_precision(self, saved):
        network = load("edm2", saved()).network
        x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.25, 0.5])
        with torch.no_grad():
            half, full = (n(i, t, torch.tensor([0, 4])) for n, i in ((half_copy(network), x.half()), (network, x)))
        assert half.dtype == torch.float16
        assert relative_l2(half.float().numpy(), full.numpy()) < 1e-2

    def test_recognise(self):
        shapes = {name.removeprefix("unet."): tuple(tensor.shape) for name, tensor in state_of("uncond").items()}
        guess = edm2.recognise(shapes, {})
        assert (guess.family, guess.facts["classes"], guess.facts["size"]) == ("edm2", "none", "8×8, 3 channels")
        assert edm2.recognise({"emb_noise.weight": (1, 1)}, {}) is None
        assert edm2.recognise({**shapes, "out_conv.weight": (3,)}, {}) is None


class Precond:
    """Stands for the owner's class of that name: loading its pickle runs code of it."""

    def __setstate__(self, case):
        self.init_kwargs = {name: value for name, value in init_of(case).items() if name != "precond"}
        self.state_dict = lambda: state_of(case)

    def __getstate__(self):
        return "uncond"


class TestFilesThatAreRefused:
    def test_the_advice_for_an_official_pickle_works(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "edm2-img64-s.pkl").write_bytes(pickle.dumps({"ema": Precond()}))
        with pytest.raises(BundleError, match="take the weights out in a checkout of NVlabs/edm2") as error:
            load("edm2", tmp_path / "edm2-img64-s.pkl")
        taken_out(str(error.value), monkeypatch)
        assert load("edm2", "edm2-img64-s.pt").classes == 0

    @pytest.mark.parametrize(
        ("init", "state", "options", "message"),
        [
            ({"label_dim": 0}, {}, {}, "its init says label_dim = 0, and its tensors are of a network with 5"),
            ({}, {}, {"res_balance": 0.4, "sigma": 1}, "edm2 takes no option 'sigma'"),
            ({"sigma_data": 1.0}, {}, {"sigma_data": 0.5}, "sigma_data = 0.5 contradicts the file, whose init has 1"),
            ({}, {}, {"path": "x"}, "edm2 takes no option 'path'"),
            ({"channels_per_head": 0}, {}, {}, "channels_per_head = 0 makes no head"),
            ({"resample_filter": "box"}, {}, {}, "resample_filter = 'box', which is no list of numbers"),
            ({}, {"unet.out_gain": None}, {}, "out_gain is missing in it: save"),
            ({}, {"unet.dec.8x8_block1.emb_gain": torch.ones(3)}, {}, r"emb_gain has shape \[3\] in it: save"),
            ({}, {"unet.dec.8x8_up.conv_res0.weight": None}, {}, "lacks the tensor dec.8x8_up.conv_res0.weight"),
            ({}, {"unet.emb_noise.weight": None}, {}, "holds no network of this family"),
            ({}, {"unet.enc.8x8_conv.weight": torch.ones(16, 4, 3, 3)}, {}, "enc.8x8_conv.weight has shape"),
        ],
    )
    def test_what_contradicts(self, saved, init, state, options, message):
        with pytest.raises(EpsrtError, match=message) as error:
            load("edm2", saved(init=init, state=state), **options)
        assert "\n" not in str(error.value)
