"""Networks of NVlabs/edm: equal to what the owner's code gave, and told by their own tensors.

tests/data/foreign/edm.npz is of github.com/NVlabs/edm at 008a4e5: outputs of its networks, with the weights of
recorded.py, and images of its edm_sampler from epsrt's noise of seed 7, with its defaults.
"""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from recorded import denoised, recorded, state_for

from epsrt import BundleError, EpsrtError, Sampler, Schedule, noise
from epsrt.manifest import Sampling
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt_export import export
from epsrt_export.families import edm, load
from epsrt_export.families.look import look
from epsrt_export.precision import half_copy

RECORD = recorded("edm")
LABELS = (1, 5)  # the last is none


def init_of(case):
    return json.loads(str(RECORD[f"{case}.init"]))


def state_of(case):
    """What net.state_dict() gave: weights, and the buffers of the owner."""
    state = state_for(json.loads(str(RECORD[f"{case}.shapes"])))
    if "model.map_noise.freqs" in state:
        state["model.map_noise.freqs"] *= 160  # N(0, 16²), as they are drawn
    if taps := init_of(case).get("resample_filter"):
        row = torch.tensor(taps, dtype=torch.float32)
        state["model.enc.4x4_down.conv0.resample_filter"] = (torch.outer(row, row) / row.sum() ** 2)[None, None]
    if f"{case}.u" in RECORD:
        state["u"] = torch.from_numpy(RECORD[f"{case}.u"])
    return state


@pytest.fixture
def saved(tmp_path):
    def save(case="ncsnpp", init=(), state=(), name="edm.pt"):
        what = {"init": {**init_of(case), **dict(init)}, "weights": {**state_of(case), **dict(state)}}
        torch.save(what, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("case", ["ncsnpp", "ddpmpp", "explode", "skip", "adm", "iddpm"])
def test_networks_are_the_owners(saved, case):
    source = load("edm", saved(case))
    for i, label in enumerate(LABELS):
        out = denoised(source, RECORD[f"{case}.x"][i : i + 1], RECORD[f"{case}.sigma"][i], label)
        assert relative_l2(out, RECORD[f"{case}.D"][i : i + 1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ncsnpp", "ddpmpp", "iddpm"])
def test_images_are_the_owners(saved, tmp_path, case):
    """One of each preconditioner, by 18 steps of Heun, through export and Sampler."""
    source = load("edm", saved(case))
    export(source, tmp_path / "x.epsrt", precisions=("fp32",), max_batch=2)
    z, asked = noise.normals(7, range(2), noise.START, 0, 192).reshape(2, 3, 8, 8), {}
    if source.schedule.preserves_variance:  # theirs begins from σ·z, not z
        ends = [source.sampling.options[name] for name in ("sigma_max", "sigma_min")]
        sigma = (np.linspace(ends[0] ** (1 / 7), ends[1] ** (1 / 7), 18)) ** 7
        if case == "iddpm":  # theirs takes the nearest whole timesteps
            u = RECORD["iddpm.u"].astype(np.float64)
            near = np.abs(sigma[:, None] - u).argmin(1)
            sigma, asked = u[near], {"timesteps": (999.0 - near).tolist(), "method": "heun"}
        asked["x"] = z * sigma[0] / np.sqrt(1 + sigma[0] ** 2)
    if source.classes:
        asked["labels"] = [LABELS[0], None if source.null_label else 0]
    with Sampler.open(tmp_path / "x.epsrt", "onnxruntime", threads=1) as sampler:
        images = sampler.sample(2, seed=7, **asked)
    known = slice(2 if not source.classes or source.null_label else 1)
    want = RECORD[f"{case}.sample"][known]
    assert np.abs(want).max() < 1e3
    assert worst_psnr(images[known], want, (float(want.min()), float(want.max()))) > 100


class TestSources:
    def test_a_source_says_all(self, saved):
        source = load("edm", saved(init={"sigma_data": 0.4}))
        assert (source.prediction, source.sigma_data, source.clip) == ("edm", 0.4, None)
        assert (source.shape, source.classes, source.null_label) == ((3, 8, 8), 5, 5)
        assert source.schedule == Schedule("ve", 1000, sigma_min=0.002, sigma_max=80.0)
        assert source.sampling == Sampling("heun", 18, "karras", {"sigma_min": 0.002, "sigma_max": 80.0})
        assert (source.family, source.origin) == ("edm", "training.networks.EDMPrecond")
        assert source.config["taps"] == (1, 3, 3, 1)
        assert any("map_augment" in note for note in source.notes)
        assert not source.network.training

    @pytest.mark.parametrize("nested", [True, False])
    def test_a_bare_state_dict(self, saved, tmp_path, nested):
        state = state_of("adm")
        state = state if nested else {name.removeprefix("model."): value for name, value in state.items()}
        torch.save(state, tmp_path / "bare.pt")
        bare, whole = load("edm", tmp_path / "bare.pt"), load("edm", saved("adm"))
        x, t = torch.ones(1, 3, 8, 8), torch.ones(1)
        assert torch.equal(bare.network(x, t, torch.tensor([2])), whole.network(x, t, torch.tensor([2])))
        said = " ".join(bare.notes)
        assert "taken for EDMPrecond" in said
        assert "sigma_data=0.5" in said
        assert "label_dropout=0" in said
        assert "taken for EDMPrecond" not in " ".join(whole.notes)
        assert bare.null_label is None
        assert load("edm", tmp_path / "bare.pt", label_dropout=0.1).null_label == 5

    def test_what_follows_from_the_file(self, saved, tmp_path):
        """A learned variance is of iDDPM, whose levels follow from its numbers where the file lacks them."""
        state = {name: value for name, value in state_of("iddpm").items() if name != "u"}
        torch.save(state, tmp_path / "bare.pt")
        found, want = load("edm", tmp_path / "bare.pt"), load("edm", saved("iddpm"))
        assert found.origin == want.origin == "training.networks.iDDPMPrecond"
        np.testing.assert_allclose(found.schedule.alpha_bar, want.schedule.alpha_bar, rtol=1e-3)
        source = load("edm", saved("ddpmpp", {"precond": None, "epsilon_t": 1e-4}))
        assert source.origin == "training.networks.VPPrecond"
        assert not source.network.training

    def test_sides(self, saved):
        assert load("edm", saved(), size="8,16").shape == (3, 8, 16)
        with pytest.raises(EpsrtError, match="size = 9 does not suit the network, which takes multiples of 2"):
            load("edm", saved(), size=9)

    def test_half_precision(self, saved):
        for case in ("ncsnpp", "ddpmpp", "adm"):
            network = load("edm", saved(case)).network
            x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.25, 0.5])
            labels = [torch.tensor([0, 5])] if case != "ddpmpp" else []
            with torch.no_grad():
                half, full = half_copy(network)(x.half(), t, *labels), network(x, t, *labels)
            assert half.dtype == torch.float16
            assert relative_l2(half.float().numpy(), full.numpy()) < 1e-2

    def test_recognise(self):
        shapes = {name.removeprefix("model."): tuple(t.shape) for name, t in state_of("ncsnpp").items()}
        guess = edm.recognise(shapes, {})
        assert (guess.family, guess.facts["classes"], guess.facts["size"]) == ("edm", "5", "8×8, 3 channels")
        assert guess.facts["network"] == "SongUNet (NCSN++)"
        assert set(guess.missing) == {"precond", "label_dropout"}
        assert edm.recognise(shapes, {"init": {"label_dim": 5}}).missing == {}
        assert edm.recognise({"conv_in.weight": (32, 3, 3, 3)}, {}) is None
        assert edm.recognise({**shapes, "enc.8x8_conv.weight": (16,)}, {}) is None


class EDMPrecond:
    """Stands for the owner's class of that name: loading its pickle runs code of it."""

    def __setstate__(self, case):
        self.init_kwargs = {name: value for name, value in init_of(case).items() if name != "precond"}
        self.state_dict = lambda: state_of(case)

    def __getstate__(self):
        return "adm"


class TestFilesThatAreRefused:
    def test_the_advice_for_an_official_pickle_works(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "edm-adm.pkl").write_bytes(pickle.dumps({"ema": EDMPrecond()}))
        with pytest.raises(BundleError, match="take the weights out in a checkout of NVlabs/edm") as error:
            load("edm", tmp_path / "edm-adm.pkl")
        assert "\n" not in str(error.value)
        (code,) = re.findall(r'python -c "(.*)"$', str(error.value))
        with pytest.raises(BundleError, match="epsrt export --from edm .*edm-adm.pkl edm.epsrt prints the command"):
            look(tmp_path / "edm-adm.pkl")
        exec(code, {})
        assert load("edm", "edm.pt").origin == "training.networks.EDMPrecond"

    @pytest.mark.parametrize(
        ("case", "init", "options", "message"),
        [
            ("adm", {"num_blocks": 2}, {}, "its init says num_blocks = 2, and its tensors are of a network with 1"),
            ("adm", {"model_type": "SongUNet"}, {}, "init says model_type = SongUNet, .*a network with DhariwalUNet"),
            ("adm", {"precond": "Precond"}, {}, "precond 'Precond' is unknown"),
            ("adm", {"sigma_data": "much"}, {}, "sigma_data = 'much' is not a number"),
            ("adm", {"precond": "EDMPrecond"}, {"precond": "VEPrecond"}, "contradicts the file, .* has EDMPrecond"),
            ("adm", {"sigma_data": 0.5}, {"sigma_data": 0.6}, "sigma_data = 0.6 contradicts .* has 0.5: leave it out"),
            ("adm", {}, {"beta_d": 3.0}, "beta_d is of VPPrecond, and this network has EDMPrecond: leave it out"),
            ("ddpmpp", {"beta_min": 0.0}, {}, "beta_min = 0 makes no VPPrecond: its default is 0.1"),
            ("ddpmpp", {"epsilon_t": 2.0}, {}, "is not below the one before it"),
            ("explode", {}, {"sigma_max": 0.01}, "a ve schedule needs 0 < sigma_min < sigma_max"),
            ("iddpm", {"M": 0}, {}, "M = 0 makes no iDDPMPrecond"),
            ("ddpmpp", {}, {"label_dropout": 0.1}, "label_dropout = 0.1 is for networks with classes"),
            ("iddpm", {"precond": "VPPrecond"}, {}, "VPPrecond is of networks without a learned variance"),
        ],
    )
    def test_what_contradicts(self, saved, case, init, options, message):
        with pytest.raises(EpsrtError, match=message) as error:
            load("edm", saved(case, init), **options)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model.enc.8x8_conv.weight": None}, "enc.8x8_conv.weight is missing"),
            ({"model.dec.4x4_in0.proj.bias": None}, "it lacks the tensor dec.4x4_in0.proj.bias, 1 of"),
            ({"model.enc.8x8_conv.weight": torch.ones(16)}, r"enc.8x8_conv.weight has shape \[16\]"),
            ({"model.extra": torch.ones(1)}, "it has a tensor extra"),
            ({"model.map_layer0.weight": None}, "holds no network of this family"),
            ({"model.out_conv.weight": torch.ones(4, 32, 3, 3)}, "returns 4 channels for 3"),
        ],
    )
    def test_missing_and_surplus_tensors(self, tmp_path, change, message):
        state = {name: value for name, value in {**state_of("adm"), **change}.items() if value is not None}
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(BundleError, match=message):
            load("edm", tmp_path / "x.pt")

    def test_levels_that_are_none(self, tmp_path):
        torch.save({**state_of("iddpm"), "u": torch.ones(1)}, tmp_path / "x.pt")
        with pytest.raises(BundleError, match=r"its noise levels u have shape \[1\]"):
            load("edm", tmp_path / "x.pt")

    def test_an_init_that_is_none(self, tmp_path):
        torch.save({"init": [8, 3], "weights": state_of("adm")}, tmp_path / "x.pt")
        with pytest.raises(BundleError, match="its init is a list, not a dict of arguments"):
            load("edm", tmp_path / "x.pt")
