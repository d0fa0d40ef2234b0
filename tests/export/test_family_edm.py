"""Networks of NVlabs/edm: equal to what the owner's code gave, and told by their own tensors.

tests/data/foreign/edm.npz is of github.com/NVlabs/edm at 008a4e5: outputs of its networks, with the weights of
recorded.py, and images of its edm_sampler from epsrt's noise of seed 7, with its defaults.
"""

import json
import pickle

import numpy as np
import pytest
import torch
from recorded import denoised, recorded, state_for, taken_out

from epsrt import BundleError, EpsrtError, Sampler, Schedule, noise
from epsrt.manifest import Sampling
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt_export import export
from epsrt_export.families import edm, load, nvlabs
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

    @pytest.mark.parametrize("case", ["ncsnpp", "adm"])
    def test_averages_without_names(self, tmp_path, case):
        """They stand for the parameters, in their order, and not for buffers."""
        state = state_of(case)
        shadow = [2 * t for name, t in state.items() if not name.endswith(("resample_filter", "freqs"))]
        for averages, name in ((shadow, "x.pt"), (shadow[1:], "less.pt"), ([*shadow, shadow[0]], "more.pt")):
            torch.save({"net": state, "ema": {"shadow_params": averages}}, tmp_path / name)
        named = {name: t for (name, t) in state.items() if name.endswith(("resample_filter", "freqs"))}
        doubled = {name: named.get(name, 2 * t) for name, t in state.items()}
        torch.save(doubled, tmp_path / "doubled.pt")
        x, t, label = torch.ones(1, 3, 8, 8), torch.ones(1), torch.tensor([2])
        found, want = (load("edm", tmp_path / name).network(x, t, label) for name in ("x.pt", "doubled.pt"))
        assert torch.equal(found, want)
        assert not torch.allclose(found, load("edm", tmp_path / "x.pt", ema=False).network(x, t, label))
        for name in ("less.pt", "more.pt"):
            with pytest.raises(
                BundleError, match=r"its shadow_params are \d+ tensors without names, .* with ema=false"
            ):
                load("edm", tmp_path / name)

    def test_a_filter_may_be_a_tuple(self, saved):
        assert load("edm", saved(init={"resample_filter": (1, 3, 3, 1)})).config["taps"] == (1, 3, 3, 1)

    def test_latents(self, tmp_path):
        state = state_of("adm")
        first, last, bias = (f"model.{name}" for name in ("enc.8x8_conv.weight", "out_conv.weight", "out_conv.bias"))
        four = {first: torch.ones(state[first].shape[0], 4, 3, 3), last: torch.ones(4, *state[last].shape[1:])}
        torch.save({**state, **four, bias: torch.ones(4)}, tmp_path / "four.pt")
        source = load("edm", tmp_path / "four.pt")
        assert (source.latents, source.value_range) == (True, (-4.0, 4.0))
        assert "four.pt: its samples of 4 channels were taken for an autoencoder's latents: --set latents=false" in (
            " ".join(source.notes)
        )
        source = load("edm", tmp_path / "four.pt", latents=False)
        assert (source.latents, source.value_range) == (False, (-1.0, 1.0))
        with pytest.raises(EpsrtError, match="latents = 'perhaps' is not true or false"):
            load("edm", tmp_path / "four.pt", latents="perhaps")

    def test_sides(self, saved):
        assert load("edm", saved(), size="8,16").shape == (3, 8, 16)
        with pytest.raises(EpsrtError, match="size = 9,9 does not suit the network, which takes multiples of 2"):
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
        with pytest.raises(BundleError, match="take the weights out in a checkout of NVlabs/edm"):
            look(tmp_path / "edm-adm.pkl")
        taken_out(str(error.value), monkeypatch)
        assert load("edm", "edm-adm.pt").origin == "training.networks.EDMPrecond"

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
            ("iddpm", {"M": 2.5}, {}, "M = 2.5 makes no iDDPMPrecond"),
            ("ddpmpp", {"M": float("inf")}, {}, "M = inf makes no VPPrecond"),
            ("adm", {"precond": []}, {}, r"precond \[\] is unknown"),
            ("adm", {}, {"path": "x"}, "edm takes no option 'path'"),
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
            ({"model.enc.8x8_conv.weight": torch.ones(37, 3, 3, 3)}, "torch makes none: .*divisible.*: save"),
            ({"model.out_conv.bias": torch.tensor(1.0)}, r"out_conv.bias has shape \[\], the network"),
        ],
    )
    def test_missing_and_surplus_tensors(self, tmp_path, change, message):
        state = {name: value for name, value in {**state_of("adm"), **change}.items() if value is not None}
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(BundleError, match=message):
            load("edm", tmp_path / "x.pt")

    def test_filters_that_are_none(self, tmp_path):
        name = "model.enc.4x4_down.conv0.resample_filter"
        for kernel, message in ((torch.ones(4), r"has shape \[4\]"), (torch.zeros(1, 1, 4, 4), "which is no filter")):
            torch.save({**state_of("ncsnpp"), name: kernel}, tmp_path / "x.pt")
            with pytest.raises(BundleError, match=message):
                load("edm", tmp_path / "x.pt")

    def test_other_errors_of_pickles_stand(self, tmp_path):
        with pytest.raises(BundleError, match="nope.pkl does not exist"):
            load("edm", tmp_path / "nope.pkl")
        torch.save({"a": torch.ones(1)}, tmp_path / "other.pkl")
        with pytest.raises(BundleError, match="holds no network of this family"):
            load("edm", tmp_path / "other.pkl")
        torch.save({"a": torch.ones(1)}, tmp_path / "early.pkl", _use_new_zipfile_serialization=False)
        with pytest.raises(BundleError, match="holds no network of this family"):
            load("edm", tmp_path / "early.pkl")

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_the_way_to_take_weights_out(self, tmp_path, protocol, monkeypatch):
        """Names are quoted for a shell, and the owner is the one of the source that is in the pickle."""
        path = tmp_path / "it's $(touch x).pkl"
        for source, owner in (("class SongUNet:", "edm"), ("class MPFourier:", "edm2")):
            content = {"ema": EDMPrecond(), "module_src": source}
            path.write_bytes(pickle.dumps(content, protocol=protocol))
            assert nvlabs.is_pickle(path)
            assert f"a checkout of NVlabs/{owner}, " in nvlabs.how(path)
        taken_out(nvlabs.how(path), monkeypatch)
        assert load("edm", path.with_suffix(".pt")).origin == "training.networks.EDMPrecond"

    def test_levels_that_are_none(self, tmp_path):
        torch.save({**state_of("iddpm"), "u": torch.ones(1)}, tmp_path / "x.pt")
        with pytest.raises(BundleError, match=r"its noise levels u have shape \[1\]"):
            load("edm", tmp_path / "x.pt")

    def test_an_init_that_is_none(self, tmp_path):
        torch.save({"init": [8, 3], "weights": state_of("adm")}, tmp_path / "x.pt")
        with pytest.raises(BundleError, match="its init is a list, not a dict of arguments"):
            load("edm", tmp_path / "x.pt")
