"""denoising-diffusion-pytorch: files as its Trainer saves them, and its own sampling loops as the truth."""

import functools
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from epsrt import EpsrtError, Sampler, Schedule, noise, open_engine, solvers, timesteps
from epsrt.errors import BundleError
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families import lucidrains, lucidrains_diffusions, lucidrains_unet
from epsrt_export.precision import half_copy
from epsrt_export.redraw import redraw

if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
    pytest.skip("denoising-diffusion-pytorch is not installed", allow_module_level=True)

theirs, labelled = lucidrains_unet.theirs(), lucidrains_unet.theirs("classifier_free_guidance")
from denoising_diffusion_pytorch import (  # noqa: E402
    ContinuousTimeGaussianDiffusion,
    ElucidatedDiffusion,
    KarrasUnet,
    KarrasUnet1D,
    KarrasUnet3D,
    Unet1D,
)
from denoising_diffusion_pytorch.learned_gaussian_diffusion import LearnedGaussianDiffusion  # noqa: E402
from ema_pytorch import EMA  # noqa: E402

T, SIZE, SEED, IMAGES = 20, 8, 11, 3
KINDS = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}


def unet(seed=0, channels=1, dim=8, dim_mults=(1, 2), **more):
    """Theirs, every weight redrawn; what it returns has RMS 1 or somewhat less, so that few x0 are clipped."""
    network = theirs.Unet(dim=dim, dim_mults=dim_mults, channels=channels, **more)
    shape = (channels, SIZE, SIZE)
    if network.out_dim == channels:
        return redraw(network, Schedule("cosine", T), shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in network.eval().parameters():
        p.data = torch.randn(p.shape, generator=generator) / (p[0].numel() ** 0.5 if p.ndim > 1 else 10)
    with torch.no_grad():
        out = network(torch.randn(16, *shape, generator=generator), torch.arange(16.0))
        network.final_conv.weight /= 2 * out.std()
    return network


def diffusion(objective="pred_v", beta_schedule="sigmoid", seed=0, learned=False, timesteps=T, **more):
    network = unet(seed, learned_variance=learned)
    if objective == "pred_x0":
        network.final_conv.weight.data *= 3  # it was fitted to ε, whose share in x falls
    cls = LearnedGaussianDiffusion if learned else theirs.GaussianDiffusion
    kind = {"objective": objective, "beta_schedule": beta_schedule, "timesteps": timesteps, "image_size": SIZE}
    return cls(network, **kind, **more).eval()


def trained(make, steps=40):
    """make(), and on digits, for a few seconds: with random weights their rounding to half alone costs 1e-3."""
    data = load_digits()
    digits, classes = torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.train().parameters(), 3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            some = torch.randint(len(digits), (32,))
            told = {"classes": classes[some]} if isinstance(model, labelled.GaussianDiffusion) else {}
            model(digits[some], **told).backward()
            optimizer.step()
    return model.eval()


def smallest(**kind):
    return theirs.GaussianDiffusion(theirs.Unet(8, dim_mults=(1,)), image_size=8, **kind)


def saved(path, model, online=None):
    """Trainer.save, line by line."""
    online = model if online is None else online
    ema = EMA(online, beta=0.995, update_every=10)
    ema.ema_model.load_state_dict(model.state_dict())
    data = {
        "step": 700,
        "model": online.state_dict(),
        "opt": torch.optim.Adam(online.parameters()).state_dict(),
        "ema": ema.state_dict(),
        "scaler": None,
        "version": theirs.__version__,
    }
    torch.save(data, path)
    return path


def drawn(stream, n):
    return torch.from_numpy(noise.normals(SEED, range(IMAGES), stream, n, SIZE**2).reshape(IMAGES, 1, SIZE, SIZE))


@pytest.fixture
def sampled(monkeypatch):
    """sampled(diffusion, …): what its own sample(…) returns, with our noise in place of torch's, as −1 … 1."""

    def run(model, **asked):
        rows = iter(range(10_000))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda shape, device=None: drawn(noise.START, 0))
            patched.setattr(torch, "randn_like", lambda x: drawn(noise.STEP, next(rows)))
            return 2 * model.sample(**(asked or {"batch_size": IMAGES})).numpy() - 1

    return run


def plan_of(source):
    by = source.sampling
    variance = {"variance": source.variance} if source.variance else {}
    return solvers.make(
        by.method,
        source.schedule,
        steps=by.steps,
        spacing=by.spacing,
        prediction=source.prediction,
        clip=source.clip,
        **variance,
        **by.options,
    )


@torch.inference_mode()
def plain(source):
    """The source's own plan, row by row, in PyTorch."""
    plan, x = plan_of(source), drawn(noise.START, 0)
    names = ("t", "clip", "n", "r", *"pqabhd")
    for row in zip(*(plan[name].astype(np.float32).tolist() for name in names), strict=True):
        k = dict(zip(names, row, strict=True))
        out = source.network(x, torch.full((IMAGES,), k["t"]))
        out, v = out[:, :1], out[:, 1:] if source.variance else torch.zeros(())
        x0 = (k["p"] * x + k["q"] * out).clamp(-k["clip"], k["clip"])
        x = k["a"] * x + k["b"] * x0 + k["h"] * out + k["d"] * torch.exp(k["r"] * v) * drawn(noise.STEP, int(k["n"]))
    return x.numpy()


class TestNumbers:
    @pytest.mark.parametrize("objective", KINDS)
    @pytest.mark.parametrize(
        "how", [{}, {"sampling_timesteps": 10}, {"sampling_timesteps": 5, "ddim_sampling_eta": 0.7}], ids=str
    )
    def test_samples_are_theirs(self, tmp_path, sampled, objective, how):
        model = diffusion(objective, **how)
        source = lucidrains.load(saved(tmp_path / "model-7.pt", model), image_size=SIZE, **how)
        assert source.prediction == KINDS[objective]
        truth = sampled(model)
        assert worst_psnr(plain(source), truth, (-1.0, 1.0)) > 100
        assert 0.2 < truth.std() < 0.99
        assert (np.abs(truth) < 0.99).mean() > 0.1
        assert np.abs(truth[0] - truth[1]).max() > 0.3

    @pytest.mark.parametrize("objective", KINDS)
    def test_predictions_are_theirs(self, tmp_path, objective):
        """At each timestep, from the same x."""
        model = diffusion(objective, "cosine")
        source = lucidrains.load(saved(tmp_path / "model-7.pt", model), image_size=SIZE)
        x = torch.from_numpy(noise.normals(SEED, range(T), noise.FORWARD, 0, SIZE**2).reshape(T, 1, SIZE, SIZE))
        t = torch.arange(T)
        levels = solvers.visit(source.schedule, np.arange(T)[::-1], prediction=source.prediction)
        with torch.no_grad():
            eps, x0 = model.model_predictions(x, t)
            out = source.network(x, t.float())
        for (p, q), truth in ((levels.x0, x0), (levels.epsilon, eps)):
            p, q = (torch.from_numpy(c[::-1].copy()).view(-1, 1, 1, 1) for c in (p, q))
            error = (p * x + q * out - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
            assert float(error.max()) < 1e-5

    def test_a_learned_variance(self, tmp_path, sampled):
        """Whatever the objective that its loss weights show: LearnedGaussianDiffusion takes ε."""
        model = diffusion("pred_v", "cosine", learned=True)
        source = lucidrains.load(saved(tmp_path / "model-7.pt", model), image_size=SIZE, learned_variance=True)
        assert (source.prediction, source.variance) == ("epsilon", "learned_range")
        truth = sampled(model)
        assert worst_psnr(plain(source), truth, (-1.0, 1.0)) > 100
        with torch.no_grad():
            v = model.model(drawn(noise.START, 0), torch.full((IMAGES,), 9))[:, 1:]
        assert v.std() > 0.1  # or the fixed variance would do

    def test_the_averaged_weights_or_not(self, tmp_path):
        average, online = diffusion(seed=1), diffusion(seed=2)
        path = saved(tmp_path / "model-7.pt", average, online)
        x, t = drawn(noise.START, 0), torch.full((IMAGES,), 7.0)
        for option, model in (({}, average), ({"ema": True}, average), ({"ema": False}, online)):
            source = lucidrains.load(path, image_size=SIZE, **option)
            with torch.no_grad():
                assert torch.equal(source.network(x, t), model.model(x, t))
            assert source.training == {"steps": 700}
            assert f"the {'plain' if model is online else 'averaged (EMA)'} weights were taken" in source.notes[0]

    @pytest.mark.parametrize("fourier", [False, True])
    def test_half_precision_keeps_the_time_and_the_norms(self, tmp_path, fourier):
        """Without it their frequencies, rounded to half, turn sin(2π·t·f) at t = 999 by half a radian and more."""
        network = unet(learned_sinusoidal_cond=fourier)
        torch.save(network.state_dict(), tmp_path / "unet.pt")
        half = half_copy(alone(tmp_path / "unet.pt").network)
        x, t = drawn(noise.START, 0), torch.tensor([3.0, 500.0, 999.0])
        with torch.no_grad():
            truth, out = network(x, t), half(x.half(), t).float()
        assert (out - truth).norm() / truth.norm() < 2e-3


def drawn_by(source, path, **asked):
    """IMAGES samples of a source's bundle, in FP32."""
    bundle = export(source, path, max_batch=IMAGES, precisions=("fp32",))
    with Sampler(open_engine(bundle, "onnxruntime", precision="fp32", threads=1)) as sampler:
        return sampler.sample(IMAGES, seed=SEED, **asked)


class TestTheUnetWithClasses:
    @pytest.mark.slow
    def test_samples_are_theirs_with_and_without_guidance(self, tmp_path, sampled):
        """Guided as their function does it where remove_parallel_component is false; their sample() leaves it true."""
        how = {"sampling_timesteps": 10, "ddim_sampling_eta": 0.3}
        model = trained(
            lambda: labelled.GaussianDiffusion(
                labelled.Unet(8, 10, dim_mults=(1, 2), channels=1), image_size=SIZE, timesteps=T, **how
            )
        )
        torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
        source = lucidrains.load(tmp_path / "model.pt", image_size=SIZE, **how)
        assert (source.classes, source.null_label, source.prediction) == (10, 10, "epsilon")
        assert source.sampling.options == {"eta": 0.3, "rederive": False}
        other = lucidrains.load(tmp_path / "model.pt", image_size=SIZE, sampling_timesteps=10)
        assert other.sampling.options["eta"] == 1.0
        assert "remove_parallel_component=False" in source.notes[-1]
        labels = torch.tensor([3, 0, 9])
        x, t = drawn(noise.START, 0), torch.full((IMAGES,), 7.0)
        with torch.no_grad():
            for told, drop in ((labels, 0.0), (torch.full((IMAGES,), 10), 1.0)):
                assert torch.equal(source.network(x, t, told), model.model(x, t, labels, cond_drop_prob=drop))
        guided = functools.partial(model.model.forward_with_cond_scale, remove_parallel_component=False)
        model.model.forward_with_cond_scale = guided
        truth = sampled(model, classes=labels, cond_scale=3.0, rescaled_phi=0.7)
        ours = drawn_by(source, tmp_path / "a.epsrt", labels=labels.tolist(), guidance=3.0, guidance_rescale=0.7)
        assert worst_psnr(ours, truth, (-1.0, 1.0)) > 100
        assert 0.2 < truth.std() < 0.95
        model.model.forward_with_cond_scale = lambda *args, **_: 2 * (model.model(*args, cond_drop_prob=0.0),)
        with Sampler.open(tmp_path / "a.epsrt", "onnxruntime", threads=1) as sampler:
            plain = sampler.sample(IMAGES, seed=SEED, labels=labels.tolist())
        assert worst_psnr(plain, sampled(model, classes=labels), (-1.0, 1.0)) > 100

    @pytest.mark.parametrize(
        ("heads", "options"),
        [
            ({}, {}),
            ({"attn_heads": 2, "attn_dim_head": 8}, {"attn_heads": 2}),
            ({"attn_heads": 2, "attn_dim_head": 8}, {"attn_dim_head": 8}),
        ],
    )
    def test_its_heads(self, tmp_path, heads, options):
        network = labelled.Unet(8, 3, dim_mults=(1, 2), channels=1, init_dim=12, **heads)
        torch.save(network.state_dict(), tmp_path / "unet.pt")
        source = alone(tmp_path / "unet.pt", **options)
        x, t, label = drawn(noise.START, 0), torch.full((IMAGES,), 7.0), torch.tensor([0, 1, 2])
        with torch.no_grad():
            assert torch.equal(source.network(x, t, label), network(x, t, label, cond_drop_prob=0.0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "attn_heads × attn_dim_head = 16, and neither of the two: say attn_heads"),
            ({"attn_heads": 3}, "attn_heads = 3 contradicts .*is 16"),
            ({"attn_heads": 2, "cond_scale": 6}, "cond_scale is chosen when sampling: epsrt sample --guidance weighs"),
            ({"attn_heads": 2, "beta_schedule": "sigmoid"}, "'sigmoid' is unknown: use one of linear, cosine"),
            ({"attn_heads": 2, "num_classes": 4}, "num_classes = 4 contradicts .* num_classes = 3"),
        ],
    )
    def test_refusals(self, tmp_path, options, message):
        network = labelled.Unet(8, 3, dim_mults=(1, 2), channels=1, attn_heads=2, attn_dim_head=8)
        torch.save(network.state_dict(), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match=message):
            alone(tmp_path / "unet.pt", **options)


def karras(channels=1, **shape):
    network = KarrasUnet(
        image_size=SIZE, dim=8, channels=channels, fourier_dim=4, attn_dim_head=8, num_blocks_per_stage=1, **shape
    )
    for name, p in network.eval().named_parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        if name.endswith("gain"):  # zero, they would make it blind
            p.data.fill_(0.5)
    return network


class TestTheKarrasUnet:
    @pytest.mark.slow
    def test_samples_are_theirs(self, tmp_path, sampled):
        network = karras(dim_max=16, num_downsamples=2, attn_res=(8, 2))
        how = {"objective": "pred_v", "beta_schedule": "cosine", "timesteps": T, "sampling_timesteps": 10}
        model = theirs.GaussianDiffusion(network, image_size=SIZE, **how).eval()
        torch.save({"_orig_mod." + k: v for k, v in model.state_dict().items()}, tmp_path / "model.pt")
        source = lucidrains.load(tmp_path / "model.pt", image_size=SIZE, sampling_timesteps=10)
        truth = sampled(model)
        assert worst_psnr(drawn_by(source, tmp_path / "a.epsrt"), truth, (-1.0, 1.0)) > 100
        assert 0.2 < truth.std() < 0.99

    @pytest.mark.parametrize(
        "shape",
        [
            {"num_downsamples": 0, "attn_res": (8,)},
            {"num_downsamples": 1, "attn_res": ()},
            {"num_downsamples": 2, "attn_res": (16, 4), "dim_max": 24},
            {"num_downsamples": 1, "attn_res": 8, "num_classes": 3, "mp_cat_t": 0.4, "channels": 2},
        ],
        ids=str,
    )
    def test_its_arguments_are_read(self, tmp_path, shape):
        network = karras(**shape)
        torch.save(network.state_dict(), tmp_path / "unet.pt")
        x, t, told = torch.randn(2, network.channels, SIZE, SIZE), torch.tensor([3.0, 17.0]), torch.tensor([0, 2])
        with torch.no_grad():
            truth = network(x, t, class_labels=told) if "num_classes" in shape else network(x, t)
            assert truth.std() > 0.1
            for given in (shape, {name: value for name, value in shape.items() if name == "mp_cat_t"}):
                source = alone(tmp_path / "unet.pt", **given)
                assert torch.equal(source.network(x, t, *([told] if source.classes else [])), truth)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": "8,16"}, "a KarrasUnet takes squares alone"),
            ({"image_size": 9}, "takes multiples of 2"),
            ({"attn_res": 8}, "attn_res = .* contradicts"),
            ({"dim_mults": 3}, "takes no option 'dim_mults' for a KarrasUnet .gaussian."),
        ],
    )
    def test_refusals(self, tmp_path, options, message):
        torch.save(karras(num_downsamples=1, attn_res=(4,)).state_dict(), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match=message):
            alone(tmp_path / "unet.pt", **options)

    def test_half_precision(self, tmp_path):
        torch.save(karras(num_downsamples=1, attn_res=(4,)).state_dict(), tmp_path / "unet.pt")
        network = alone(tmp_path / "unet.pt").network
        half, x, t = half_copy(network), drawn(noise.START, 0), torch.tensor([3.0, 500.0, 999.0])
        with torch.no_grad():
            truth, out = network(x, t), half(x.half(), t).float()
        assert (out - truth).norm() / truth.norm() < 5e-3


class TestTheElucidatedDiffusion:
    @pytest.mark.slow
    def test_samples_are_theirs(self, tmp_path, monkeypatch):
        """32 steps of Heun with churn: theirs draws noise before each step, and ours in the row before."""
        unet = functools.partial(theirs.Unet, 8, dim_mults=(1, 2), channels=1, learned_sinusoidal_cond=True)
        model = trained(lambda: ElucidatedDiffusion(unet(), image_size=SIZE, channels=1))
        torch.save(EMA(model).state_dict(), tmp_path / "ema.pt")
        source = lucidrains.load(tmp_path / "ema.pt", image_size=SIZE)
        assert (source.prediction, source.sampling.method, source.sampling.steps) == ("edm", "heun", 32)
        plan = plan_of(source)
        rows = [drawn(noise.START, 0), None, *(drawn(noise.STEP, int(plan["n"][i])) for i in range(1, 63, 2))]
        calls = iter(rows)
        with monkeypatch.context() as patched:
            zeros = torch.zeros(IMAGES, 1, SIZE, SIZE)  # the first step, at σ = 80, is above S_tmax
            patched.setattr(torch, "randn", lambda shape, device=None: zeros if (row := next(calls)) is None else row)
            truth = 2 * model.sample(IMAGES).numpy() - 1
        assert next(calls, None) is None
        assert np.count_nonzero(plan["d"]) > 20
        assert worst_psnr(drawn_by(source, tmp_path / "a.epsrt"), truth, (-1.0, 1.0)) > 100
        assert 0.2 < truth.std() < 0.95

    def test_its_options(self, tmp_path):
        torch.save(unet(learned_sinusoidal_cond=True).state_dict(), tmp_path / "unet.pt")
        told = {"sigma_max": 50, "sigma_data": 0.4, "num_sample_steps": 12, "S_churn": 0, "rho": 5}
        source = lucidrains.load(tmp_path / "unet.pt", image_size=SIZE, diffusion="elucidated", **told)
        assert (source.schedule.sigma_max, source.sigma_data, source.sampling.steps) == (50, 0.4, 12)
        assert (source.sampling.options["s_churn"], source.sampling.options["rho"]) == (0, 5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "learned frequencies alone, .*: say diffusion=elucidated, or objective and beta_schedule"),
            ({"diffusion": "elucidated", "num_sample_steps": 1}, "num_sample_steps = 1: their levels need at least 2"),
            ({"diffusion": "elucidated", "sigma_min": 90}, "sigma_min = 90 is not between 0 and sigma_max = 80"),
            ({"diffusion": "elucidated", "objective": "pred_v"}, "no option 'objective' for a Unet .elucidated."),
        ],
        ids=str,
    )
    def test_refusals(self, tmp_path, options, message):
        torch.save(unet(learned_sinusoidal_cond=True).state_dict(), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match=message):
            lucidrains.load(tmp_path / "unet.pt", image_size=SIZE, **options)


class TestWhereFilesHaveIt:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "net."])
    @pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
    def test_prefixes_and_wrappers(self, tmp_path, prefix, wrapper):
        model = diffusion("pred_v", "cosine")
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "some.pt")
        source = lucidrains.load(tmp_path / "some.pt", image_size=SIZE)
        assert source.prediction == "v"
        assert prefix.split(".")[0] in " ".join(source.notes)
        x, t = drawn(noise.START, 0), torch.full((IMAGES,), 7.0)
        with torch.no_grad():
            assert torch.equal(source.network(x, t), model.model(x, t))

    @pytest.mark.parametrize("whole", [True, False], ids=["diffusion", "unet"])
    @pytest.mark.parametrize("average", [True, False, None])
    def test_an_averages_own_file(self, tmp_path, whole, average):
        online, wanted = diffusion(seed=2), diffusion(seed=1)
        ema = EMA(online if whole else online.model)
        ema.ema_model.load_state_dict((wanted if whole else wanted.model).state_dict())
        torch.save(ema.state_dict(), tmp_path / "ema.pt")
        given = {} if whole else {"objective": "pred_v", "beta_schedule": "sigmoid", "timesteps": T}
        source = lucidrains.load(tmp_path / "ema.pt", image_size=SIZE, ema=average, **given)
        truth = (online if average is False else wanted).model
        x, t = drawn(noise.START, 0), torch.full((IMAGES,), 7.0)
        with torch.no_grad():
            assert torch.equal(source.network(x, t), truth(x, t))
        assert source.schedule.T == T


class TestOtherData:
    @pytest.mark.parametrize(
        ("make", "way"),
        [
            (lambda: Unet1D(8, dim_mults=(1, 2)), r"1-dimensional data, .*self.net\(x\[:, :, 0\], t\)\[:, :, None\]"),
            (
                lambda: KarrasUnet1D(seq_len=8, dim=8, num_downsamples=1, num_blocks_per_stage=1),
                "1-dimensional data, .*height 1",
            ),
            (
                lambda: KarrasUnet3D(image_size=8, frames=4, dim=8, num_downsamples=1, num_blocks_per_stage=1),
                "3-dimensional data, .*one below another",
            ),
        ],
    )
    def test_networks_of_sequences_and_volumes(self, tmp_path, make, way):
        state = make().state_dict()
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(EpsrtError, match=way):
            alone(tmp_path / "net.pt")
        guess = lucidrains.recognise({name: tuple(t.shape) for name, t in state.items()}, {})
        assert guess.family == ""
        assert "adapter" in guess.facts["refused"]

    def test_continuous_time(self, tmp_path):
        model = ContinuousTimeGaussianDiffusion(unet(learned_sinusoidal_cond=True), image_size=SIZE, channels=1)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        with pytest.raises(EpsrtError, match="continuous time .* told log SNR and not a timestep"):
            lucidrains.load(tmp_path / "model.pt", image_size=SIZE)


class TestRecognise:
    def guess(self, module, prefix="", **rest):
        return lucidrains.recognise({prefix + n: tuple(t.shape) for n, t in module.state_dict().items()}, rest)

    def test_networks(self):
        whole = self.guess(diffusion(), "module.", version="2.3.4")
        assert whole.family == "denoising-diffusion-pytorch"
        assert whole.facts == {
            "network": "Unet of denoising-diffusion-pytorch (denoising_diffusion_pytorch.py)",
            "channels": "1",
            "image size": "multiples of 2",
            "version": "2.3.4",
            "diffusion": "GaussianDiffusion",
        }
        assert set(whole.missing) == {"image_size"}
        assert set(self.guess(unet()).missing) == {"image_size", "objective", "beta_schedule"}
        fourier = unet(learned_sinusoidal_cond=True)
        assert set(self.guess(fourier).missing) == {"image_size", "diffusion"}
        assert self.guess(fourier, "ema_model.net.").facts["diffusion"] == "ElucidatedDiffusion"
        assert self.guess(labelled.Unet(8, 5, dim_mults=(1,))).facts["classes"] == "5"
        assert "KarrasUnet" in self.guess(karras(num_downsamples=1)).facts["network"]
        assert self.guess(unet(learned_variance=True)).facts["variance"] == "learned"

    def test_others(self):
        assert self.guess(nn.Linear(2, 2)) is None
        assert lucidrains.recognise({"init_conv.weight": (8, 1, 7, 7), "final_conv.weight": (1, 8, 1, 1)}, {}) is None


def alone(path, **more):
    return lucidrains.load(path, **{"image_size": SIZE, "objective": "pred_v", "beta_schedule": "cosine", **more})


class TestWhatTheFileSays:
    def test_all_of_it(self, tmp_path):
        path = saved(tmp_path / "model-7.pt", diffusion("pred_noise", "linear", timesteps=40))
        source = families.load(
            "denoising-diffusion-pytorch", path, image_size="8,16", sampling_timesteps=10, auto_normalize=False
        )
        assert source.shape == (1, 8, 16)
        assert source.schedule == Schedule("linear", 40, beta_start=0.0025, beta_end=0.5)
        assert (source.prediction, source.clip, source.value_range) == ("epsilon", 1.0, (0.0, 1.0))
        assert (source.sampling.method, source.sampling.steps) == ("ddim", 10)
        assert source.sampling.options == {"eta": 0.0, "rederive": True}
        assert (source.family, source.name) == ("denoising-diffusion-pytorch", "model-7.pt")
        assert (source.version, len(source.sha256)) == (theirs.__version__, 64)
        assert source.config["dim_mults"] == [1, 2]
        json.dumps([source.config, source.training])
        assert not source.network.training

    def test_a_diffusion_alone_and_a_unet_alone(self, tmp_path):
        model = diffusion()
        torch.save(model.state_dict(), tmp_path / "diffusion.pt")
        torch.save(model.model.state_dict(), tmp_path / "unet.pt")
        whole = lucidrains.load(tmp_path / "diffusion.pt", image_size=SIZE)
        part = alone(tmp_path / "unet.pt", beta_schedule="sigmoid", timesteps=T)
        assert part.schedule == whole.schedule
        assert part.prediction == whole.prediction == "v"
        assert alone(tmp_path / "unet.pt").schedule == Schedule("cosine", 1000)
        assert part.version == whole.version == ""

    @pytest.mark.parametrize(
        "shape",
        [
            {"dim": 16, "dim_mults": (1,), "channels": 3},
            {"dim_mults": (1, 2, 3), "init_dim": 12, "full_attn": (True, False, True)},
            {"attn_heads": (2, 3), "attn_dim_head": (8, 16), "full_attn": (False, False)},
            {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6, "dropout": 0.1, "flash_attn": True},
            {"random_fourier_features": True, "sinusoidal_pos_emb_theta": 100},
            {"channels": 2, "learned_variance": True},
        ],
        ids=str,
    )
    def test_every_argument_of_the_unet(self, tmp_path, shape):
        """Read from the file, and taken where it is given too."""
        network = unet(**shape)
        torch.save(network.state_dict(), tmp_path / "unet.pt")
        size = 8
        x, t = torch.randn(2, network.channels, size, size), torch.tensor([3.0, 17.0])
        for given in (shape, {k: v for k, v in shape.items() if k == "sinusoidal_pos_emb_theta"}):
            objective = {"objective": None} if network.out_dim > network.channels else {}
            source = alone(tmp_path / "unet.pt", **given, **objective)
            with torch.no_grad():
                torch.testing.assert_close(source.network(x, t), network(x, t), rtol=1e-5, atol=1e-6)

    def test_options_as_words(self, tmp_path):
        torch.save(unet(dim_mults=(1, 2)).state_dict(), tmp_path / "unet.pt")
        words = {"dim_mults": "1, 2", "full_attn": "false,true", "attn_heads": 4, "attn_dim_head": "32,32", "dim": 8}
        assert alone(tmp_path / "unet.pt", **words, image_size="8").shape == (1, 8, 8)

    @pytest.mark.parametrize("kind", lucidrains_diffusions.BETA_SCHEDULES)
    @pytest.mark.parametrize("steps", [50, 1000])
    def test_schedules_are_theirs_in_float64(self, kind, steps):
        model = theirs.GaussianDiffusion(
            theirs.Unet(8, dim_mults=(1,)), image_size=8, timesteps=steps, beta_schedule=kind
        )
        schedule, found = lucidrains_diffusions.schedule_of(theirs, dict(model.named_buffers()), None, kind, "x.pt")
        exact = getattr(theirs, f"{kind}_beta_schedule")(steps).numpy()
        assert found == kind
        np.testing.assert_allclose(schedule.beta, exact, rtol=1e-12, atol=1e-15)
        assert schedule.kind == ("given" if kind == "sigmoid" else kind)

    def test_schedules_of_other_arguments_are_the_buffer(self):
        model = smallest(timesteps=T, schedule_fn_kwargs={"start": -2})
        schedule, found = lucidrains_diffusions.schedule_of(theirs, dict(model.named_buffers()), None, None, "x.pt")
        assert found == "given"
        np.testing.assert_array_equal(schedule.beta.astype(np.float32), model.betas.numpy())

    @pytest.mark.parametrize("objective", KINDS)
    @pytest.mark.parametrize("kind", lucidrains_diffusions.BETA_SCHEDULES)
    @pytest.mark.parametrize(
        "clipped", [{}, {"min_snr_loss_weight": True}, {"min_snr_loss_weight": True, "min_snr_gamma": 1}]
    )
    def test_objectives_by_their_loss_weights(self, objective, kind, clipped):
        for steps in (T + 5, 1000):
            model = smallest(timesteps=steps, beta_schedule=kind, objective=objective, **clipped)
            buffers = dict(model.named_buffers())
            schedule, _ = lucidrains_diffusions.schedule_of(theirs, buffers, None, None, "x.pt")
            assert lucidrains_diffusions.prediction_of(buffers, schedule, None, False, "x.pt") == KINDS[objective]

    def test_ddim_timesteps(self):
        """As the docstring has it: theirs where S divides T, else at most one noisier."""

        def visited(steps, total):  # GaussianDiffusion.ddim_sample
            times = torch.linspace(-1, total - 1, steps=steps + 1)
            return list(reversed(times.int().tolist()))[:-1]

        for total in (1000, 250):
            for steps in range(1, total):
                ours, their = (np.array(ts) for ts in (timesteps.spaced(total, steps), visited(steps, total)))
                assert set(ours - their) <= ({0} if total % steps == 0 else {0, 1, 2})


class TestTheWholeGate:
    @pytest.mark.slow
    def test_passes_in_both_precisions_and_samples_theirs(self, tmp_path, sampled):
        how = {"sampling_timesteps": 10, "ddim_sampling_eta": 0.5}
        size = {"image_size": SIZE, "timesteps": T}
        model = trained(lambda: theirs.GaussianDiffusion(theirs.Unet(8, dim_mults=(1,), channels=1), **size, **how))
        source = lucidrains.load(saved(tmp_path / "model-7.pt", model), image_size=SIZE, **how)
        bundle = export(source, tmp_path / "some.epsrt", max_batch=IMAGES)
        rungs = {(r.name, r.precision): r for r in bundle.parity()}
        assert all(r.passed for r in rungs.values())
        for name in ("network", "step", f"ddim-{T}", f"ddpm-{T}", "batch"):
            assert {(name, "fp32"), (name, "fp16")} <= set(rungs)
        kept = bundle.golden()
        assert 0.2 < kept.trajectories[f"ddim-{T}"].x.std() < 0.95
        assert 0.2 < kept.network.out.std() < 2
        with Sampler(open_engine(bundle, "onnxruntime", precision="fp32", threads=1)) as sampler:
            images = sampler.sample(IMAGES, seed=SEED)
            every = sampler.sample(IMAGES, seed=SEED, method="ddpm", steps=T)
        assert worst_psnr(images, sampled(model), (-1.0, 1.0)) > 100
        model.is_ddim_sampling = False
        assert worst_psnr(every, sampled(model), (-1.0, 1.0)) > 100
        assert bundle.manifest.provenance.network.endswith("Unet")
        assert bundle.manifest.provenance.family == "denoising-diffusion-pytorch"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("saved") / "model-7.pt", diffusion("pred_v", "cosine"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": None}, "image_size is not in the file: give it"),
            ({"image_size": 9}, "image_size = 9,9 does not suit the network, which takes multiples of 2"),
            ({"image_size": "8,8,8"}, "image_size = 8,8,8 is neither one number"),
            ({"image_size": "big"}, "image_size = 'big' is not a whole number"),
            ({"dim": 64}, "dim = 64 contradicts .*model-7.pt, whose network has dim = 8: leave it out"),
            ({"dim": "small"}, "dim = 'small' is not a whole number"),
            ({"dim_mults": "1,2,4"}, "dim_mults = 1,2,4 contradicts .* dim_mults = 1,2"),
            ({"channels": 3}, "channels = 3 contradicts"),
            ({"init_dim": 9}, "init_dim = 9 contradicts"),
            ({"out_dim": 2}, "out_dim = 2 contradicts"),
            ({"attn_heads": 8}, "attn_heads = 8 contradicts .* attn_heads = 4,4"),
            ({"attn_dim_head": (32, 16)}, "attn_dim_head = .* contradicts"),
            ({"full_attn": True}, "full_attn = True contradicts .* full_attn = False,True"),
            ({"learned_variance": True}, "learned_variance = True contradicts"),
            ({"random_fourier_features": True}, "learned_sinusoidal_cond = True contradicts"),
            ({"learned_sinusoidal_dim": 16}, "learned_sinusoidal_dim = 16 contradicts"),
            ({"self_condition": True}, "takes a second image, the x0 of the step before .*: train with"),
            ({"num_classes": 3}, "takes no option 'num_classes' for a Unet .gaussian."),
            ({"S_churn": 3}, "takes no option 'S_churn' for a Unet .gaussian."),
            ({"diffusion": "edm"}, "diffusion 'edm' is unknown: use one of gaussian, elucidated"),
            ({"diffusion": "elucidated"}, "a Unet with learned frequencies .*, and this is a Unet without"),
            ({"timesteps": 1000}, "timesteps = 1000 contradicts .*, which has 20 betas: leave it out"),
            ({"timesteps": 0}, "timesteps = 0 makes no diffusion"),
            ({"objective": "pred_x0"}, "objective = pred_x0 contradicts .*, whose loss weights are of pred_v"),
            ({"objective": "pred_eps"}, "objective 'pred_eps' is unknown"),
            ({"beta_schedule": "linear"}, "beta_schedule = linear contradicts .*, whose betas are of cosine"),
            ({"beta_schedule": "quadratic"}, "beta_schedule 'quadratic' is unknown"),
            ({"sampling_timesteps": 21}, "sampling_timesteps = 21 is outside 1 … 20"),
            ({"ddim_sampling_eta": 2}, "ddim_sampling_eta = 2.0 is outside"),
            ({"auto_normalize": "maybe"}, "auto_normalize = 'maybe' is not true or false"),
            ({"ema": 3}, "ema = 3 is not true or false"),
        ],
        ids=str,
    )
    def test_options(self, file, options, message):
        with pytest.raises(EpsrtError, match=message) as caught:
            lucidrains.load(file, **{"image_size": SIZE, **options})
        assert "\n" not in str(caught.value)

    def test_unknown_options(self, file):
        with pytest.raises(EpsrtError, match="no option 'image_sise' for a Unet .gaussian.: did you mean image_size"):
            families.load("denoising-diffusion-pytorch", file, image_sise=8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": None}, "does not say what its network predicts: say objective"),
            ({"beta_schedule": None}, "is a network alone: say beta_schedule, one of linear, cosine, sigmoid"),
            ({"ema": True}, "ema = true, but .* holds the plain weights alone: leave ema out"),
        ],
        ids=str,
    )
    def test_a_unet_alone(self, tmp_path, options, message):
        torch.save(unet().state_dict(), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match=message):
            alone(tmp_path / "unet.pt", **options)

    def test_learned_variance_has_one_objective(self, tmp_path):
        torch.save(unet(learned_variance=True).state_dict(), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match="objective = pred_x0 is not of .*LearnedGaussianDiffusion, which takes ε"):
            alone(tmp_path / "unet.pt", objective="pred_x0")
        assert alone(tmp_path / "unet.pt", objective="pred_noise").variance == "learned_range"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: {"net" + k: v for k, v in s.items()}, "holds no network of this family"),
            (lambda s: {**s, "downs.0.2.fn.fn.to_qkv.weight": s["init_conv.weight"]}, "the package's earlier layout"),
            (lambda s: {**s, "init_conv.weight": torch.zeros(8, 2, 7, 7)}, "self_condition"),
            (lambda s: {**s, "final_conv.weight": torch.zeros(4, 8, 1, 1)}, "returns 4 channels for 1"),
            (
                lambda s: {k: v for k, v in s.items() if "mem_kv" not in k},
                "downs.0.2.mem_kv is missing in it: .*from Python",
            ),
            (lambda s: {k: v for k, v in s.items() if "mid_attn.norm" not in k}, "lacks the tensor mid_attn.norm.g"),
            (lambda s: {**s, "more": torch.zeros(1)}, "tensor more, .* that the network lacks"),
            (lambda s: {**s, "more": [torch.zeros(1)]}, "entry 'more' is a list, not a tensor"),
            (lambda s: [1], "holds a list, not a dict of tensors"),
        ],
    )
    def test_files(self, tmp_path, change, message):
        torch.save(change(unet().state_dict()), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match=message):
            alone(tmp_path / "unet.pt")

    @pytest.mark.parametrize(
        "odd",
        [
            {"final_conv.weight": ()},
            {"time_mlp.3.weight": ()},
            {"time_mlp.3.weight": (2, 32)},
            {"init_conv.weight": ()},
            {"downs.0.2.mem_kv": (2, 4)},
            {"downs.0.3.1.weight": (7, 8, 1, 1)},
        ],
        ids=str,
    )
    def test_odd_tensors(self, tmp_path, odd):
        state = unet().state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        assert lucidrains.recognise({**shapes, **odd}, {}) is None
        torch.save({**state, **{name: torch.ones(shape) for name, shape in odd.items()}}, tmp_path / "unet.pt")
        with pytest.raises(BundleError, match="(has shape .* in it|a stage of 7 channels).*: save its state_dict"):
            alone(tmp_path / "unet.pt")

    def test_names_that_are_no_modules(self, tmp_path):
        state = unet().state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in ("downs.enc.weight", "downs.900000000.weight"):
            assert lucidrains.recognise({**shapes, name: (1,)}, {}) == lucidrains.recognise(shapes, {})
        torch.save({**state, "downs.enc.weight": torch.ones(1)}, tmp_path / "unet.pt")
        with pytest.raises(BundleError, match="it has a tensor downs.enc.weight"):
            alone(tmp_path / "unet.pt")
        assert lucidrains.recognise({n: s for n, s in shapes.items() if not n.startswith("downs.")}, {}) is None

    def test_odd_karras(self):
        from denoising_diffusion_pytorch.karras_unet import KarrasUnet

        made = KarrasUnet(image_size=8, dim=8, dim_max=16, num_downsamples=1, num_blocks_per_stage=1, attn_dim_head=8)
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        want = lucidrains.recognise(shapes, {})
        assert want is not None
        assert lucidrains.recognise({**shapes, "downs.900000000.weight": (1,)}, {}) is not None
        for name in ("output_block.0.weight", "input_block.weight", "to_time_emb.0.weights"):
            assert lucidrains.recognise({**shapes, name: ()}, {}) is None

    def test_latents(self, tmp_path):
        torch.save(theirs.Unet(8, dim_mults=(1, 2), channels=4).state_dict(), tmp_path / "unet.pt")
        source = alone(tmp_path / "unet.pt")
        assert source.latents
        assert any("taken for an autoencoder's latents" in note for note in source.notes)
        assert not alone(tmp_path / "unet.pt", latents=False).latents
        with pytest.raises(EpsrtError, match="takes no option 'path'"):
            families.load("denoising-diffusion-pytorch", tmp_path / "unet.pt", path="x", image_size=8)

    def test_a_trainers_file_without_an_average(self, tmp_path, file):
        data = torch.load(file, weights_only=True)
        del data["ema"]
        torch.save(data, tmp_path / "model-8.pt")
        assert lucidrains.load(tmp_path / "model-8.pt", image_size=SIZE).training == {"steps": 700}
        with pytest.raises(EpsrtError, match="ema = true, but .* holds the plain weights alone"):
            lucidrains.load(tmp_path / "model-8.pt", image_size=SIZE, ema=True)

    def test_pickles_and_damage(self, tmp_path, file):
        torch.save({"model": nn.Linear(1, 1)}, tmp_path / "whole.pt")
        (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:5000])
        for name in ("whole.pt", "cut.pt", "none.pt"):
            with pytest.raises(BundleError):
                lucidrains.load(tmp_path / name, image_size=SIZE)

    def test_self_conditioning_by_the_file(self, tmp_path):
        torch.save(theirs.Unet(8, dim_mults=(1, 2), self_condition=True).state_dict(), tmp_path / "unet.pt")
        with pytest.raises(EpsrtError, match="self_condition"):
            alone(tmp_path / "unet.pt")

    def test_without_the_package(self, monkeypatch, file):
        for name in [n for n in sys.modules if n.partition(".")[0] == "denoising_diffusion_pytorch"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
        with pytest.raises(EpsrtError, match="trained with .*: pip install denoising-diffusion-pytorch"):
            lucidrains.load(file, image_size=SIZE)
        left = [name for name in lucidrains_unet.PICTURES if not getattr(sys.modules.get(name), "__file__", True)]
        assert left == []


def test_the_norm_is_theirs_bit_for_bit():
    norm = theirs.RMSNorm(6)
    norm.g.data = torch.randn(norm.g.shape)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(lucidrains_unet.Norm(norm)(x), norm(x))
    assert isinstance(lucidrains_unet.Norm(norm), nn.RMSNorm)
