"""Networks of score_sde_pytorch: equal to what the owner's code gave, and told by their tensors and a configuration.

tests/data/foreign/score_sde.npz is of github.com/yang-song/score_sde_pytorch at cb1f359: −σ·score of its networks, made
small, with the weights of recorded.py; and images of its samplers from epsrt's noise of seed 7, without a corrector.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from recorded import recorded, state_for

from epsrt import BundleError, EpsrtError, InputError, Sampler, Schedule
from epsrt.manifest import Sampling
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt_export import export
from epsrt_export.families import load, score_sde
from epsrt_export.families.score_sde_configs import CONFIGS
from epsrt_export.families.score_sde_unet import ScoreConfig, ScoreUNet
from epsrt_export.precision import half_copy

RECORD = recorded("score_sde")
CASES = tuple(name.removesuffix(".shapes") for name in RECORD if name.endswith(".shapes"))


def state_of(case):
    state = state_for(json.loads(str(RECORD[f"{case}.shapes"])))
    if "all_modules.0.W" in state:
        state["all_modules.0.W"] *= 160  # N(0, 16²), as they are drawn
    return state


def levels_of(case):
    """Their buffer `sigmas`, the noisiest first."""
    high = CONFIGS[case].sigma_max
    return torch.from_numpy(np.exp(np.linspace(np.log(high), np.log(0.01), CONFIGS[case].scales)))


@pytest.fixture
def saved(tmp_path):
    def save(case, changes=(), shadow=None):
        """A checkpoint as save_checkpoint of theirs writes it, the averages twice the weights or as given."""
        state = {**state_of(case), **dict(changes)}
        state = {name: value for name, value in state.items() if value is not None}
        trained = [value for name, value in state.items() if not name.endswith(".W") or "NIN" in name]
        model = {"module.sigmas": levels_of(case), **{f"module.{name}": value for name, value in state.items()}}
        shadow = trained if shadow is None else shadow
        ema = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow}
        optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 2e-4}]}
        torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 7}, tmp_path / "checkpoint_7.pth")
        return tmp_path / "checkpoint_7.pth"

    return save


@pytest.mark.parametrize("case", CASES)
def test_networks_are_the_owners(saved, case):
    source = load("score-sde", saved(case), config=case, image_size=8)
    with torch.no_grad():
        t = torch.from_numpy(RECORD[f"{case}.rows"].astype(np.float32))
        out = source.network(torch.from_numpy(RECORD[f"{case}.x"]), t).numpy()
    assert relative_l2(out, RECORD[f"{case}.epsilon"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vp/cifar10_ddpmpp", "ve/cifar10_ncsnpp", "ve/cifar10_ncsnpp_continuous"])
def test_images_are_the_owners(saved, tmp_path, case):
    """Ancestral sampling of VP and reverse diffusion of VE, in all 1,000 steps, through export and Sampler."""
    source = load("score-sde", saved(case), config=case, image_size=8)
    export(source, tmp_path / "x.epsrt", precisions=("fp32",), max_batch=2)
    with Sampler.open(tmp_path / "x.epsrt", "onnxruntime", threads=1) as sampler:
        images = sampler.sample(2, seed=7)
    want = RECORD[f"{case}.image"]
    assert worst_psnr(images, want, (float(want.min()), float(want.max()))) > 100


# requires_grad parameters, as the owner's code counts them
PUBLISHED = {
    "vp/cifar10_ddpmpp": 61_804_419,
    "vp/cifar10_ddpmpp_deep_continuous": 106_632_579,
    "vp/cifar10_ncsnpp": 62_693_251,
    "vp/ddpm/bedroom": 111_569_923,
    "vp/ddpm/cifar10": 35_218_947,
    "ve/celeba_ncsnpp": 62_693_251,
    "ve/cifar10_ncsnpp_continuous": 62_758_787,
    "ve/church_ncsnpp_continuous": 65_574_421,
    "ve/ffhq_ncsnpp_continuous": 105_785_880,
}


def published(name):
    """The network of a configuration, without weights."""
    c = CONFIGS[name]
    config = ScoreConfig(
        channels=3,
        width=c.width,
        widths=tuple(c.width * mult for mult in c.mult),
        blocks=c.blocks,
        attended=tuple(c.size >> level == 16 for level in range(len(c.mult))),
        fourier="fourier" in c.kind,
        biggan=c.kind != "ddpm",
        pyramid="input_skip" if "skip" in c.kind else "residual" if "ncsn++" in c.kind else "none",
        skips="skip" in c.kind,
        fir=c.fir,
    )
    with torch.device("meta"):
        return config, ScoreUNet(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config, network = published(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[name]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert score_sde._shown({**shapes, "sigmas": (1000,)}, "x") == dataclasses.replace(config, fir=False)
    assert name in score_sde._fitting(config, levels_of(name))


class TestSources:
    def test_of_ve(self, saved):
        source = load(
            "score-sde", saved("ve/church_ncsnpp_continuous"), config="ve/church_ncsnpp_continuous", image_size=8
        )
        assert (source.shape, source.prediction, source.value_range, source.clip) == (
            (3, 8, 8),
            "epsilon",
            (0, 1),
            None,
        )
        assert source.schedule.kind == "ve"
        assert source.schedule.T == 2000
        assert (source.schedule.sigma_min, source.schedule.sigma_max) == pytest.approx((0.01, 380))
        assert source.sampling == Sampling("euler-maruyama", 2000)
        assert (source.family, source.origin, source.training) == ("score-sde", "models.ncsnpp.NCSNpp", {"step": 7})
        assert any("Langevin's corrector" in note for note in source.notes)
        assert any("other sizes than ve/church" in note for note in source.notes)
        assert not source.network.training

    def test_of_vp(self, saved):
        case = "vp/cifar10_ddpmpp"
        source = load("score-sde", saved(case), config=case, image_size="8,16")
        assert (source.shape, source.value_range) == ((3, 8, 16), (-1.0, 1.0))
        assert source.schedule == Schedule("linear", 1000, 1e-4, 0.02)
        assert source.sampling == Sampling("ddpm", 1000, options={"variance": "fixed_large"})
        for asked in ("configs/vp/cifar10_ddpmpp_continuous.py", "vp/cifar10_ddpmpp_deep_continuous"):
            real = load("score-sde", saved(case), config=asked, image_size=8)
            t = np.array([0.001, 0.5, 1.0])  # their marginal_prob
            np.testing.assert_allclose(real.schedule.alpha_bar[[0, 499, 999]], np.exp(-9.95 * t**2 - 0.1 * t))
            assert any("equal up to O(β²) a step" in note for note in real.notes)

    def test_averages_without_names(self, saved):
        """They lie in the order of the parameters that are trained, without the Fourier frequencies."""
        case = "ve/cifar10_ncsnpp_continuous"
        state = state_of(case)
        trained = [2 * value for name, value in state.items() if name != "all_modules.0.W"]
        path = saved(case, shadow=trained)
        x, t = torch.ones(1, 3, 8, 8), torch.ones(1)
        averaged, plain = (load("score-sde", path, config=case, image_size=8, ema=ema) for ema in (None, False))
        assert torch.equal(averaged.network.net.all_modules[1].weight, 2 * plain.network.net.all_modules[1].weight)
        assert torch.equal(averaged.network.net.all_modules[0].W, plain.network.net.all_modules[0].W)
        assert not torch.allclose(averaged.network(x, t), plain.network(x, t))
        with pytest.raises(BundleError, match="its shadow_params are 3 tensors without names"):
            load("score-sde", saved(case, shadow=trained[:3]), config=case, image_size=8)

    def test_latents(self, saved):
        case = "ve/church_ncsnpp_continuous"
        source = load("score-sde", saved(case), config=case, image_size=8, latents=True)
        assert (source.latents, source.value_range) == (True, (-4.0, 4.0))

    @pytest.mark.parametrize("case", ["vp/ddpm/cifar10", "ve/church_ncsnpp_continuous"])
    def test_half_precision(self, saved, case):
        network = load("score-sde", saved(case), config=case, image_size=8).network
        x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0, 700.0])
        with torch.no_grad():
            half, full = half_copy(network)(x.half(), t), network(x, t)
        assert half.dtype == torch.float16
        assert relative_l2(half.float().numpy(), full.numpy()) < 1e-2

    def test_what_the_tensors_show_need_not_be_said(self):
        def guess(name):
            shapes = {key: tuple(tensor.shape) for key, tensor in published(name)[1].state_dict().items()}
            return score_sde.recognise(shapes, {})

        found = guess("ve/cifar10_ncsnpp_continuous")
        assert (found.family, found.options) == ("score-sde", {"config": "ve/cifar10_ncsnpp_continuous"})
        assert found.facts["network"] == "ncsn++ fourier"
        told = guess("vp/cifar10_ncsnpp").missing["config"]
        both = "cifar10_ncsnpp, vp/cifar10_ncsnpp_continuous, subvp/cifar10_ncsnpp_continuous"
        assert told == f"one of vp/{both}, ve/cifar10_ncsnpp"
        assert guess("ve/celeba_ncsnpp").options == {"config": "ve/celeba_ncsnpp"}
        assert score_sde.recognise({"conv_in.weight": (1, 1, 3, 3)}, {}) is None
        config, _ = published("ve/bedroom_ncsnpp_continuous")
        assert set(score_sde._fitting(config, None)) == {
            f"ve/{name}_ncsnpp_continuous" for name in ("bedroom", "church", "celebahq_256", "ffhq_256")
        }
        by_noise = score_sde._fitting(config, levels_of("ve/ffhq_256_ncsnpp_continuous"))
        assert set(by_noise) == {"ve/celebahq_256_ncsnpp_continuous", "ve/ffhq_256_ncsnpp_continuous"}


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("case", "options", "message"),
        [
            ("vp/cifar10_ddpmpp", {}, "say config, one of vp/cifar10_ddpmpp, vp/cifar10_ddpmpp_continuous"),
            ("vp/cifar10_ddpmpp", {"config": "vp/cifar10_ddpmp"}, "'vp/cifar10_ddpmp' is unknown: did you mean"),
            ("vp/cifar10_ddpmpp", {"config": "ve/cifar10_ncsnpp"}, r"is of ncsn\+\+, and .* holds ddpm\+\+"),
            ("vp/cifar10_ddpmpp", {"config": "vp/cifar10_ddpmpp"}, "attends at other levels than .* 32 pixels"),
            ("vp/cifar10_ddpmpp", {"config": "vp/cifar10_ddpmpp", "image_size": 9}, "image_size = 9,9 does not suit"),
            ("vp/cifar10_ddpmpp", {"config": "vp/cifar10_ddpmpp", "image_size": "8,8,8"}, "neither one number nor"),
            ("vp/cifar10_ddpmpp", {"config": "subvp/cifar10_ddpmpp_continuous"}, "of the sub-VP SDE, .*of_alpha_bar"),
        ],
    )
    def test_configurations(self, saved, case, options, message):
        with pytest.raises(InputError, match=message) as error:
            load("score-sde", saved(case), **options)
        assert "\n" not in str(error.value)

    def test_the_advice_for_sub_vp_works(self):
        """α, σ of their subVPSDE, of the x that the schedule gives and the adapter scales."""
        t = np.arange(1, 1001) / 1000
        square = np.exp(-9.95 * t**2 - 0.1 * t)
        scale = np.sqrt(square + (1 - square) ** 2)
        alpha, sigma = Schedule.of_alpha_bar(square / scale**2).at(np.arange(1000))
        np.testing.assert_allclose(alpha * scale, np.sqrt(square))
        np.testing.assert_allclose(sigma * scale, 1 - square, rtol=1e-6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"all_modules.3.Conv_0.bias": None}, r"lacks the tensor all_modules.3.Conv_0.bias, 1 of"),
            ({"all_modules.2.weight": None}, "its tensors make no U-Net"),
            ({"all_modules.1.bias": None}, "no network"),
            ({"all_modules.99.extra": torch.ones(1)}, "it has a tensor all_modules.99.extra"),
        ],
    )
    def test_missing_and_surplus_tensors(self, saved, changes, message):
        path = saved("vp/cifar10_ddpmpp", changes)
        with pytest.raises(BundleError, match=message):
            load("score-sde", path, config="vp/cifar10_ddpmpp", image_size=8, ema=False)

    @pytest.mark.parametrize("levels", [torch.ones(0), torch.tensor(1.0), torch.zeros(5), torch.ones(2, 2)])
    def test_noise_levels_that_are_none(self, tmp_path, levels):
        torch.save({**state_of("ve/church_ncsnpp_continuous"), "sigmas": levels}, tmp_path / "x.pth")
        with pytest.raises(BundleError, match=r"its sigmas, of shape \[.*\], are no noise levels"):
            load("score-sde", tmp_path / "x.pth", config="ve/church_ncsnpp_continuous", image_size=8)

    def test_a_pickle(self, tmp_path):
        torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pth")
        with pytest.raises(EpsrtError, match="which loading would run"):
            load("score-sde", tmp_path / "x.pth", config="vp/cifar10_ddpmpp")
