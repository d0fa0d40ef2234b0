"""MONAI's DiffusionModelUNet: state dicts as its tutorials save them, and its own schedulers as the truth."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch_engine import sampled as stepped

from epsrt import BundleError, EpsrtError, Sampler, Schedule, noise, open_engine, timesteps
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families import monai
from epsrt_export.redraw import redraw

if importlib.util.find_spec("monai") is None:
    pytest.skip("monai is not installed", allow_module_level=True)

theirs = monai.theirs("monai.networks.nets.diffusion_model_unet")
schedulers = monai.theirs("monai.networks.schedulers")

T, SIZE, SEED, IMAGES = 20, 8, 11, 3
KINDS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
SMALL = {"norm_num_groups": 4, "num_head_channels": 4}
# betas like those of 1000 timesteps, for 20
STEEP = {"num_train_timesteps": T, "beta_start": 0.005, "beta_end": 0.5}


def network(colours=1, **more):
    shape = {"num_res_blocks": 1, "channels": (8, 16), "attention_levels": (False, True), **SMALL, **more}
    return theirs.DiffusionModelUNet(2, colours, colours, **shape)


def drawn_again(made, classes=0, size=(SIZE, SIZE)):
    redraw(monai.Denoiser(made), Schedule("linear", T, 0.005, 0.5), (made.in_channels, *size), classes)
    return made


def load(path, **more):
    return families.load("monai", path, **{"image_size": SIZE, "schedule": "linear_beta", **SMALL, **STEEP, **more})


def noises(stream, n):
    return torch.from_numpy(noise.normals(SEED, range(IMAGES), stream, n, SIZE**2).reshape(IMAGES, 1, SIZE, SIZE))


@pytest.fixture
def sampled(monkeypatch):
    """sampled(network, scheduler, …): the loop of MONAI's DiffusionInferer, with our noise in place of torch's."""

    @torch.inference_mode()
    def run(net, scheduler, eta=None, **labels):
        x, rows = noises(noise.START, 0), iter(range(10_000))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda *shape, **more: noises(noise.STEP, next(rows)))
            for t in scheduler.timesteps:
                out = net(x, timesteps=torch.full((IMAGES,), int(t)), **labels)
                x, _ = scheduler.step(out, int(t), x, **({} if eta is None else {"eta": eta}))
        return x.numpy()

    return run


def drawn_by(source, path, **asked):
    """IMAGES samples of a source's bundle, in FP32."""
    bundle = export(source, path, max_batch=IMAGES, precisions=("fp32",))
    with Sampler(open_engine(bundle, "onnxruntime", precision="fp32", threads=1)) as sampler:
        return sampler.sample(IMAGES, seed=SEED, **asked)


class TestNumbers:
    @pytest.mark.slow
    def test_ddpm_of_a_network_with_classes(self, tmp_path, sampled):
        made = drawn_again(network(num_class_embeds=3), classes=3)
        torch.save({"epoch": 4, "model_state_dict": made.state_dict()}, tmp_path / "net.pt")
        source = load(tmp_path / "net.pt", value_range="-1,1")
        assert (source.classes, source.prediction, source.training) == (3, "epsilon", {"epoch": 4})
        scheduler = schedulers.DDPMScheduler(schedule="linear_beta", **STEEP)
        truth = sampled(made, scheduler, class_labels=torch.tensor([0, 2, 1]))
        assert worst_psnr(drawn_by(source, tmp_path / "a.epsrt", labels=[0, 2, 1]), truth, (-1.0, 1.0)) > 100
        assert 0.2 < truth.std() < 0.95

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("how", "steps", "eta"),
        [
            ({"prediction_type": "v_prediction", "clip_sample": False}, T, 0.0),
            ({"prediction_type": "epsilon", "clip_sample_min": -2, "clip_sample_max": 2}, 7, 0.4),
            ({"prediction_type": "sample", "set_alpha_to_one": False}, 5, 0.0),
        ],
        ids=str,
    )
    def test_ddim(self, tmp_path, sampled, how, steps, eta):
        made = drawn_again(network())
        torch.save(made.state_dict(), tmp_path / "net.pt")
        asked = {"scheduler": "ddim", "num_inference_steps": steps, "eta": eta, "schedule": "scaled_linear_beta", **how}
        source = load(tmp_path / "net.pt", value_range=(-1, 1), **asked)
        scheduler = schedulers.DDIMScheduler(schedule="scaled_linear_beta", **STEEP, **how)
        scheduler.set_timesteps(steps)
        truth = sampled(made, scheduler, eta)
        assert source.prediction == KINDS[how["prediction_type"]]
        assert worst_psnr(drawn_by(source, tmp_path / "a.epsrt"), truth, (-1.0, 1.0)) > 100
        assert truth.std() > 0.2

    @pytest.mark.parametrize("kind", ["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"])
    @pytest.mark.parametrize("T", [50, 1000])
    def test_schedules(self, kind, T):
        ours = monai.scheduled(schedulers, "ddpm", kind, None, {"num_train_timesteps": T}).schedule
        np.testing.assert_allclose(ours.alpha_bar, schedulers.DDPMScheduler(T, kind).alphas_cumprod, rtol=2e-5)

    def test_timesteps_are_the_installed_packages(self):
        scheduler = schedulers.DDIMScheduler()
        for steps in (2, 15, 20, 50, 100, 250, 999, 1000):
            scheduler.set_timesteps(steps)
            made = monai.scheduled(schedulers, "ddim", "linear_beta", steps, {})
            ours = timesteps.spaced(1000, steps, made.sampling.spacing)
            apart = np.abs(ours - scheduler.timesteps.numpy())
            assert apart.max() <= 1
            assert bool(apart.any()) == bool(made.notes)

    @pytest.mark.parametrize(
        "shape",
        [
            {"num_res_blocks": (1, 2), "attention_levels": (True, False)},
            {"channels": (8, 12, 16), "attention_levels": (False, True, False), "num_head_channels": (1, 6, 8)},
            {"resblock_updown": True, "include_fc": False},
            {"use_combined_linear": True, "num_class_embeds": 5},
            {"channels": (8,), "attention_levels": (False,), "norm_num_groups": 2, "norm_eps": 1e-3},
        ],
        ids=str,
    )
    def test_every_argument_of_the_network(self, tmp_path, shape):
        """Read from the file, but for those that no tensor shows."""
        shape = {"num_res_blocks": 1, **shape}
        shape["num_res_blocks"] = np.broadcast_to(shape["num_res_blocks"], len(shape.get("channels", (8, 16)))).tolist()
        made = network(2, **shape).eval()
        for name, p in made.named_parameters():
            p.data = (
                torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / max(1, p[0].numel()) ** 0.5
            )
        torch.save({f"module.{name}": tensor for name, tensor in made.state_dict().items()}, tmp_path / "net.pt")
        told = {name: shape[name] for name in ("num_head_channels", "norm_num_groups", "norm_eps") if name in shape}
        source = load(tmp_path / "net.pt", **told)
        label = [torch.tensor([0, 4])] if source.classes else []
        x, t = torch.randn(2, 2, SIZE, SIZE), torch.tensor([3.0, 17.0])
        with torch.no_grad():
            truth = made(x, t, class_labels=label[0] if label else None)
            torch.testing.assert_close(source.network(x, t, *label), truth, rtol=1e-5, atol=1e-6)
        assert truth.std() > 0.05


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.pt"
    torch.save(network(num_class_embeds=3).state_dict(), path)
    return path


class TestWhatIsTold:
    def test_all_of_it(self, file):
        source = load(file, image_size="8x16", null_label=2, num_head_channels="0,8")
        assert source.shape == (1, 8, 16)
        assert (source.classes, source.null_label, source.value_range, source.clip) == (2, 2, (0.0, 1.0), 1.0)
        assert source.schedule == Schedule("linear", T, 0.005, 0.5)
        assert (source.sampling.method, source.sampling.steps, source.family) == ("ddpm", T, "monai")
        assert source.kind == "monai.networks.nets.diffusion_model_unet.DiffusionModelUNet"
        assert source.config["network"]["num_head_channels"] == [0, 8]
        assert source.notes == (monai.VALUES,)
        assert load(file, value_range="-1,1").notes == ()
        json.dumps(source.config)

    def test_latents(self, tmp_path):
        torch.save(network(4).state_dict(), tmp_path / "net.pt")
        source = load(tmp_path / "net.pt")
        assert (source.latents, source.value_range) == (True, (-4.0, 4.0))
        assert any("taken for an autoencoder's latents" in note for note in source.notes)
        assert load(tmp_path / "net.pt", value_range="-2,2").value_range == (-2.0, 2.0)
        source = load(tmp_path / "net.pt", latents=False)
        assert (source.latents, source.value_range) == (False, (0.0, 1.0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": None}, "image_size is not in the file: give it"),
            ({"image_size": 9}, "image_size = 9,9 does not suit the network, which takes multiples of 2"),
            ({"num_head_channels": None}, "does not say num_head_channels, .*: give it as the network had it"),
            ({"num_head_channels": 5}, "num_head_channels = 5: a level has 16 channels, no multiple of 5"),
            ({"num_head_channels": "4,4,4"}, "has 3 numbers: give one, or 2, one a level"),
            ({"num_head_channels": "few"}, "num_head_channels = 'few' is not a whole number"),
            ({"norm_num_groups": 32}, "norm_num_groups = 32 does not divide the network's channels, 8, 16"),
            ({"schedule": None}, "schedule is not in the file: give the scheduler's, one of linear_beta"),
            ({"schedule": "linear"}, "schedule 'linear' is unknown: did you mean linear_beta"),
            ({"scheduler": "pndm"}, "scheduler 'pndm' is unknown"),
            ({"prediction_type": "x0"}, "prediction_type 'x0' is unknown"),
            ({"num_train_timesteps": 0}, "num_train_timesteps = 0 makes no diffusion"),
            ({"num_inference_steps": 21}, "num_inference_steps = 21 is outside 1 … 20"),
            ({"num_inference_steps": 5}, "MONAI's DDPM steps from t to t − 1 .*: leave it out, or give scheduler=ddim"),
            ({"variance_type": "learned_range"}, "variance_type 'learned_range' is not of this network"),
            ({"clip_sample_min": 0}, "a bundle bounds x0 to −c … c alone: give such a pair, or clip_sample=false"),
            ({"scheduler": "ddim", "eta": 2}, "eta = 2.0 is outside"),
            ({"scheduler": "ddim", "steps_offset": 1}, "steps_offset = 1 moves MONAI's timesteps"),
            ({"eta": 1}, "takes no option 'eta' for ddpm with linear_beta"),
            ({"schedule": "cosine"}, "takes no option 'beta_start' for ddpm with cosine"),
            ({"null_label": 1}, "null_label = 1 is not the last of the network's 3 classes"),
            ({"value_range": "0"}, "value_range = '0' is not two numbers: give 0,1 or -1,1"),
            ({"ema": True}, "holds the plain weights alone: leave ema out"),
        ],
        ids=str,
    )
    def test_refusals(self, file, options, message):
        with pytest.raises(EpsrtError, match=message) as caught:
            load(file, **options)
        assert "\n" not in str(caught.value)


def old_names(made):
    """As MONAI Generative saved it."""
    renamed = {}
    for name, tensor in made.state_dict().items():
        name = name.replace(".attn.out_proj.", ".proj_attn.").replace(".attn.to_", ".to_").replace("postconv", "conv")
        renamed[name] = tensor
    return renamed


def general(rank, takes=1, **more):
    """A network of signals, images or volumes."""
    shape = {"num_res_blocks": 1, "channels": (8, 16), "attention_levels": (False, True), **SMALL, **more}
    return theirs.DiffusionModelUNet(rank, takes, 1, **shape)


class TestMoreThanImages:
    """In PyTorch, as the bundle's step has it; whether graphs of such networks are exact, test_conditions asks."""

    @pytest.mark.parametrize(
        ("rank", "size", "more"),
        [
            (3, (4, 6, 8), {}),
            (3, (4, 4, 4), {"num_class_embeds": 3}),
            (2, (8, 8), {"takes": 3}),
            (2, (8, 8), {"with_conditioning": True, "cross_attention_dim": 5, "transformer_num_layers": 2}),
            (3, (4, 4, 4), {"takes": 2, "with_conditioning": True, "cross_attention_dim": 5}),
        ],
        ids=str,
    )
    def test_the_loop_of_diffusion_inferer(self, tmp_path, monkeypatch, rank, size, more):
        torch.manual_seed(0)
        made = general(rank, **more).eval()
        for p in made.parameters():
            if not p.any():  # as they make what ends a block
                p.data.normal_(0, 0.2)
        torch.save(made.state_dict(), tmp_path / "net.pt")
        classes, image = more.get("num_class_embeds", 0), more.get("takes", 1) - 1
        asked = {"context_length": 4} if "cross_attention_dim" in more else {}
        source = load(tmp_path / "net.pt", image_size=",".join(map(str, size)), **asked)
        assert (source.shape, source.classes) == ((1, *size), classes)
        labels = torch.tensor([0, 2, 1]) if classes else None
        given = {"image": torch.randn(IMAGES, image, *size)} if image else {}
        given |= {"context": torch.randn(IMAGES, 4, 5)} if asked else {}
        assert [c.name for c in source.conditions] == list(given)

        def normal(stream, n):
            z = noise.normals(SEED, range(IMAGES), stream, n, int(np.prod(size)))
            return torch.from_numpy(z.reshape(IMAGES, 1, *size))

        x, rows = normal(noise.START, 0), iter(range(1000))
        scheduler = schedulers.DDPMScheduler(schedule="linear_beta", **STEEP)
        monkeypatch.setattr(torch, "randn", lambda *shape, **k: normal(noise.STEP, next(rows)))
        with torch.inference_mode():
            for t in scheduler.timesteps:
                seen = torch.cat([x, given["image"]], 1) if image else x
                told = {"context": given.get("context"), "class_labels": labels}
                out = made(seen, timesteps=torch.full((IMAGES,), int(t)), **told)
                x, _ = scheduler.step(out, int(t), x)
        monkeypatch.undo()
        conditions = {name: value.numpy() for name, value in given.items()}
        ours = stepped(
            source, IMAGES, seed=SEED, labels=None if labels is None else labels.tolist(), conditions=conditions
        )
        assert worst_psnr(ours, x.numpy(), (-1.0, 1.0)) > 100
        assert 0.2 < x.std() < 1.1
        for name in conditions:
            other = stepped(source, IMAGES, seed=SEED, conditions={**conditions, name: -conditions[name]})
            assert worst_psnr(other, x.numpy(), (-1.0, 1.0)) < 60

    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (
                lambda: general(3),
                {"image_size": "4,4"},
                "image_size = 4,4: give one number, or 3, for depth, height, w",
            ),
            (
                lambda: general(3),
                {"image_size": 5},
                "image_size = 5 does not suit the network, which takes multiples of 2",
            ),
            (lambda: general(1), {}, "1-dimensional data, which MONAI's own class does not run"),
            (lambda: general(3), {"image_size": None}, "such as image_size=64, or 64,64,64 for depth, height, width"),
            (lambda: general(2), {"context_length": 3}, "context_length = 3, and .* is of a network without a context"),
            (
                lambda: general(2, with_conditioning=True, cross_attention_dim=3),
                {},
                "does not say how many: give context_l",
            ),
        ],
    )
    def test_refusals(self, tmp_path, make, options, message):
        torch.save(make().state_dict(), tmp_path / "net.pt")
        with pytest.raises(EpsrtError, match=message):
            load(tmp_path / "net.pt", **options)

    def test_inspect(self):
        made = general(3, takes=2, with_conditioning=True, cross_attention_dim=5)
        guess = monai.recognise({name: tuple(t.shape) for name, t in made.state_dict().items()}, {})
        assert (guess.facts["samples"], guess.facts["channels"]) == ("volumes", "1")
        assert (guess.facts["takes"], guess.facts["takes a context"]) == ("an image of 1 channels", "vectors of 5")
        assert "context_length" in guess.missing


class TestOtherNetworks:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: theirs.DiffusionModelUNet(2, 1, 2, 1, (8,), (False,), 4),
                "takes 1 channels and returns 2: .*variance",
            )
        ],
    )
    def test_are_refused_by_name(self, tmp_path, make, message):
        state = make().state_dict()
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(EpsrtError, match=message):
            load(tmp_path / "net.pt")
        guess = monai.recognise({name: tuple(t.shape) for name, t in state.items()}, {})
        assert guess.family == ""
        assert "export" in guess.facts["refused"]

    def test_old_names_are_renamed_by_the_owner(self, tmp_path):
        made = network()
        torch.save(old_names(made), tmp_path / "old.pt")
        with pytest.raises(EpsrtError, match=r"net.load_old_state_dict\(torch.load\(path\)\) takes them"):
            load(tmp_path / "old.pt")
        net = network()
        net.load_old_state_dict(torch.load(tmp_path / "old.pt"))
        torch.save(net.state_dict(), tmp_path / "new.pt")
        for name, tensor in load(tmp_path / "new.pt").network.network.state_dict().items():
            assert torch.equal(tensor, made.state_dict()[name])

    def test_cut_files(self, tmp_path):
        state = network().state_dict()
        del state["down_blocks.1.resnets.0.conv1.conv.weight"]
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(EpsrtError, match="down_blocks.1.resnets.0.conv1.conv.weight is missing in it"):
            load(tmp_path / "net.pt")
        torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "other.pt")
        with pytest.raises(EpsrtError, match="no network of this family, which has a tensor conv_in.conv.weight"):
            load(tmp_path / "other.pt")

    def test_without_the_package(self, monkeypatch, file):
        for name in [n for n in sys.modules if n.partition(".")[0] == "monai"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "monai", None)
        with pytest.raises(EpsrtError, match="trained with .*: pip install monai"):
            load(file)


def test_recognise():
    shapes = {name: tuple(t.shape) for name, t in network(num_class_embeds=3).state_dict().items()}
    guess = monai.recognise(shapes, {})
    assert (guess.family, guess.facts["classes"], guess.facts["channels of each level"]) == ("monai", "3", "8, 16")
    assert set(guess.missing) == {"image_size", "num_head_channels", "schedule"}
    assert monai.recognise({"conv_in.weight": (8, 1, 3, 3)}, {}) is None


@pytest.mark.parametrize(
    "odd",
    [
        {"out.2.conv.weight": ()},
        {"conv_in.conv.weight": ()},
        {"down_blocks.0.resnets.0.conv1.conv.weight": (8,)},
        {"class_embedding.weight": (3,)},
    ],
    ids=str,
)
def test_odd_tensors(tmp_path, odd):
    state = network(num_class_embeds=3).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert monai.recognise({**shapes, **odd}, {}) is None
    torch.save({**state, **{name: torch.ones(shape) for name, shape in odd.items()}}, tmp_path / "net.pt")
    with pytest.raises(BundleError, match=f"{next(iter(odd))} has shape .* in it: save its state_dict"):
        load(tmp_path / "net.pt")


def test_names_that_are_no_modules(tmp_path):
    state = network().state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    want = monai.recognise(shapes, {})
    for name in ("down_blocks.x.y", "down_blocks.900000000.resnets.0.conv1.conv.weight"):
        assert monai.recognise({**shapes, name: (1,)}, {}) == want
    torch.save({**state, "down_blocks.x.y": torch.ones(1)}, tmp_path / "net.pt")
    with pytest.raises(EpsrtError, match="it has a tensor down_blocks.x.y"):
        load(tmp_path / "net.pt")
    assert monai.recognise({name: shapes[name] for name in monai.ANCHORS}, {}) is None
