"""Checkpoints of CompVis' latent-diffusion. The references are OpenAI's U-Net, which theirs is, and diffusers' networks
with the weights that diffusers' own conversion of such a checkpoint gives."""

import re
import sys
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from foreign import guided_unet
from recorded import state_for
from safetensors.torch import save_file
from torch import nn
from torch_engine import decoded, sampled

from epsrt import BundleError, InputError, Sampler, Schedule, noise
from epsrt.manifest import Sampling
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.first_stage import Decode, Encode, FirstStage, StageShape
from epsrt_export.families.latent_diffusion import recognise
from epsrt_export.families.look import look
from epsrt_export.redraw import redraw

SCHEDULE, SEED, SAMPLES = Schedule("scaled-linear", 100, 0.0015, 0.05), 6, 3
RANGE = (-1.0, 1.0)
SMALL = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
}
FACES = ADMConfig(**SMALL, num_head_channels=16, use_scale_shift_norm=False)
CHURCHES = ADMConfig(**SMALL, in_channels=4, num_heads=4, resblock_updown=True)
CLASSES = ADMConfig(**SMALL, num_heads=2, num_classes=1001, context_dim=24, use_scale_shift_norm=False)
VQ = StageShape(3, 32, (32, 32, 64), 1, (), True, 3, 3, 64)
SHALLOW = StageShape(3, 32, (32, 32), 1, (), True, 3, 3, 64)
KL = StageShape(3, 32, (32, 64), 1, (), True, 4, 4, 0)
TOLD = {FACES: {"num_head_channels": 16}, CHURCHES: {"num_heads": 4}, CLASSES: {"num_heads": 2}}
DDIM = {"compatible": "diffusers", "steps_offset": 1, "set_alpha_to_one": False}


def load(path, **options):
    return families.load("latent-diffusion", path, **options)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@cache
def weights(config):
    """Of a network whose trajectories are none of a constant, by their names."""
    torch.manual_seed(0)
    network = ADMUNet(config)
    redraw(network, SCHEDULE, (config.in_channels, 8, 8), config.num_classes)
    return network.state_dict()


def stage_of(shape):
    state = state_for({name: tensor.shape for name, tensor in FirstStage(shape).state_dict().items()})
    return {**state, "quantize.embedding.weight": 2 * torch.randn(shape.codes, 3)} if shape.codes else state


def checkpoint(config, stage, ema=True, **more):
    """A state dict as their LatentDiffusion has it, its noise and averages beside the network."""
    own = dict(weights(config))
    table = own.pop("label_emb.weight", None)
    plain = {name: 2 * tensor for name, tensor in own.items()} if ema else own
    state = under("model.diffusion_model.", plain)
    if ema:
        state |= {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in own.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}
    if table is not None:
        state["cond_stage_model.embedding.weight"] = table
    state |= {"betas": torch.tensor(SCHEDULE.beta).float(), "alphas_cumprod": torch.tensor(SCHEDULE.alpha_bar).float()}
    return {**state, **under("first_stage_model.", stage_of(stage)), **more}


def loaded(module, state):
    module.load_state_dict(state)
    return module.eval()


def unet_of(config, state):
    """forward(x, t, label) of another's network with the averages of a checkpoint, or its plain weights."""
    names = [name for name in state if name.startswith("model.diffusion_model.")]
    own = {name: state.get(f"model_ema.{name.removeprefix('model.').replace('.', '')}", state[name]) for name in names}
    if config.context_dim:
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=config.context_dim, attention_head_dim=config.num_heads,
            transformer_layers_per_block=config.transformer_depth,
        )  # fmt: skip
        loaded(unet, convert_ldm_unet_checkpoint(own, unet.config))
        table = state["cond_stage_model.embedding.weight"]
        return lambda x, t, label: unet(x, t, table[label][:, None]).sample
    unet = guided_unet()(
        8, config.in_channels, 32, config.in_channels, 1, [2], channel_mult=(1, 2), num_heads=config.num_heads,
        num_head_channels=config.num_head_channels, use_scale_shift_norm=config.use_scale_shift_norm,
        resblock_updown=config.resblock_updown,
    )  # fmt: skip
    loaded(unet, {name.removeprefix("model.diffusion_model."): tensor for name, tensor in own.items()})
    return lambda x, t, label: unet(t, x)


def coder_of(shape, state):
    """diffusers' autoencoder with the weights of a checkpoint."""
    levels = range(len(shape.widths))
    down, up = (
        [f"{'Attn' if i in shape.attended else ''}{way}Block2D" for i in levels] for way in ("DownEncoder", "UpDecoder")
    )
    config = {
        "block_out_channels": shape.widths, "layers_per_block": shape.blocks, "latent_channels": shape.features,
        "down_block_types": down, "up_block_types": up[::-1], "mid_block_add_attention": shape.middle,
    }  # fmt: skip
    kind = VQModel(num_vq_embeddings=shape.codes, **config) if shape.codes else AutoencoderKL(**config)
    found = {}
    for name, tensor in convert_ldm_vae_checkpoint(state, {**config, "up_block_types": up}).items():
        if level := re.fullmatch(r"(encoder.down|decoder.up)\.(\d)\.attn\.(\d)\.(\w+)\.(weight|bias)", name):
            way, i, j, part, what = level.groups()
            i = int(i) if way == "encoder.down" else len(levels) - 1 - int(i)
            part = {"norm": "group_norm", "proj_out": "to_out.0"}.get(part, f"to_{part}")
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
            name = f"{way}_blocks.{i}.attentions.{j}.{part}.{what}"
        found[name] = tensor
    if shape.codes:
        found["quantize.embedding.weight"] = state["first_stage_model.quantize.embedding.weight"]
    return loaded(kind, found)


def drawn(stream, n, shape):
    z = noise.normals(SEED, range(SAMPLES), stream, n, int(np.prod(shape)))
    return torch.from_numpy(z.reshape(SAMPLES, *shape))


@torch.no_grad()
def theirs(network, bar, shape, steps, eta):
    """DDIM (arXiv 2010.02502, eq. 12 and 16) at their timesteps 1, 1 + T/S, …; before the first is ᾱ of timestep 0."""
    at = [1 + t for t in range(0, len(bar), len(bar) // steps)]
    before = [0, *at[:-1]]
    x = drawn(noise.START, 0, shape)
    for i, (t, s) in enumerate(zip(at[::-1], before[::-1], strict=True)):
        e, a, b = network(x, torch.full((SAMPLES,), t)), bar[t], bar[s]
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        x = b.sqrt() * x0 + (1 - b - sigma**2).sqrt() * e + sigma * drawn(noise.STEP, i, shape)
    return x


@pytest.fixture
def saved(tmp_path):
    """saved(state, …) is a file as their training leaves it."""

    def save(state, name="model.ckpt", **rest):
        torch.save({"state_dict": state, "global_step": 500, **rest}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="module")
def state():
    """Of faces, with averages."""
    return checkpoint(FACES, VQ)


@pytest.fixture(scope="module")
def plain():
    """Of faces, without averages."""
    return checkpoint(FACES, VQ, ema=False)


def near(latents, pictures, source, **asked):
    """How near a source's samples come in latents and in pictures, in dB."""
    ours = sampled(source, SAMPLES, seed=SEED, **asked)
    made = decoded(source, ours)
    assert 0.1 < ours.std() < 5
    assert made.std() > 0.02
    span = [(float(each.min()), float(each.max())) for each in (latents, pictures)]
    return worst_psnr(ours, latents.numpy(), span[0]), worst_psnr(made, pictures.numpy(), span[1])


class TestSamples:
    @pytest.mark.parametrize(("config", "stage"), [(FACES, VQ), (CHURCHES, KL)], ids=["VQ", "KL"])
    @torch.no_grad()
    def test_unconditional(self, saved, config, stage):
        scale = {} if stage.codes else {"scale_factor": torch.tensor(0.22765929)}
        state = checkpoint(config, stage, **scale)
        source = load(saved(state), size=8, **TOLD[config])
        assert source.schedule == SCHEDULE
        assert (source.shape, source.latents, source.clip) == ((config.in_channels, 8, 8), True, None)
        assert source.sampling == Sampling("ddim", 50, "leading", {**DDIM, "eta": 1.0})
        assert source.autoencoder.scales == (float(scale.get("scale_factor", 1.0)),)
        unet, coder = unet_of(config, state), coder_of(stage, state)
        latents = theirs(lambda x, t: unet(x, t, None), state["alphas_cumprod"], source.shape, 50, 1.0)
        pictures = coder.decode(latents / source.autoencoder.scales[0]).sample
        in_latents, in_pictures = near(latents, pictures, source)
        assert (in_latents > 100, in_pictures > 90) == (True, True), (in_latents, in_pictures)

    @torch.no_grad()
    def test_by_class(self, saved):
        """Guided by 3, as in their notebook; the last of 1,001 labels is "none"."""
        state, labels = checkpoint(CLASSES, VQ, ema=False), torch.tensor([7, 999, 0])
        source = load(saved(state), size=8, num_heads=2)
        assert (source.classes, source.null_label) == (1000, 1000)
        assert source.sampling == Sampling("ddim", 20, "leading", DDIM, guidance=3.0)
        assert any("the last of 1001 labels was taken for" in note for note in source.notes)
        unet, coder = unet_of(CLASSES, state), coder_of(VQ, state)

        def guided(x, t):
            nothing, told = unet(x, t, torch.full_like(labels, 1000)), unet(x, t, labels)
            return nothing + 3.0 * (told - nothing)

        latents = theirs(guided, state["alphas_cumprod"], source.shape, 20, 0.0)
        in_latents, in_pictures = near(latents, coder.decode(latents).sample, source, labels=labels.tolist())
        assert (in_latents > 100, in_pictures > 90) == (True, True), (in_latents, in_pictures)
        other = sampled(source, SAMPLES, seed=SEED, labels=[0, 7, 999])
        assert worst_psnr(other, latents.numpy(), (float(latents.min()), float(latents.max()))) < 40

    @pytest.mark.slow
    def test_through_the_gate(self, saved, tmp_path):
        state, labels = checkpoint(CLASSES, SHALLOW), [7, 999, 0]
        source = load(saved(state), size=8, num_heads=2)
        bundle = export(source, tmp_path / "some.epsrt", max_batch=SAMPLES, precisions=("fp32",))
        assert set(bundle.manifest.parts) >= {"decode", "encode"}
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            made = sampler.sample(SAMPLES, seed=SEED, labels=labels)
        wanted = decoded(source, sampled(source, SAMPLES, seed=SEED, labels=labels))
        assert worst_psnr(made, wanted, (float(wanted.min()), float(wanted.max()))) > 90


class TestNetworks:
    @pytest.mark.parametrize("depth", [1, 3])
    @torch.no_grad()
    def test_by_class(self, saved, depth):
        config = ADMConfig(**{**vars(CLASSES), "num_classes": 5, "transformer_depth": depth})
        state = checkpoint(config, VQ)
        source = load(saved(state), size=8, num_heads=2)
        assert (source.classes, source.null_label, source.sampling.guidance) == (5, None, 1.0)
        x, t, label = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 1, 500, 999]), torch.tensor([0, 4, 2, 1])
        want = unet_of(config, state)(x, t, label)
        assert float((source.network(x, t, label) - want).norm() / want.norm()) < 1e-6
        assert load(saved(state), size=8, num_heads=2, num_classes=4).null_label == 4

    @pytest.mark.parametrize(
        ("heads", "parameters", "config"),
        [
            ({"num_head_channels": 32}, 274, {"num_channels": 224, "channel_mult": (1, 2, 3, 4)}),
            (
                {"num_heads": 8}, 294,
                {
                    "num_channels": 192, "channel_mult": (1, 2, 2, 4, 4), "in_channels": 4, "resblock_updown": True,
                    "use_scale_shift_norm": True, "attention_resolutions": (64, 32, 16, 8),
                },
            ),
            (
                {"num_heads": 1}, 400,
                {"num_channels": 192, "channel_mult": (1, 2, 3, 5), "context_dim": 512, "num_classes": 1001},
            ),
        ],
        ids=["faces", "churches", "ImageNet"],
    )  # fmt: skip
    def test_the_published_ones_need_not_be_told(self, heads, parameters, config):
        made = ADMConfig(
            **{
                "image_size": 64, "num_res_blocks": 2, "attention_resolutions": (32, 16, 8),
                "use_scale_shift_norm": False,
                **heads, **config,
            }
        )  # fmt: skip
        with torch.device("meta"):
            network, stage = ADMUNet(made), FirstStage(VQ if made.in_channels == 3 else KL)
        names = under("model.diffusion_model.", network.state_dict()) | under("first_stage_model.", stage.state_dict())
        if table := names.pop("model.diffusion_model.label_emb.weight", None) is not None:
            names["cond_stage_model.embedding.weight"] = torch.empty(1001, 512)
        own = sum(p.numel() for name, p in network.named_parameters() if name != "label_emb.weight" or not table)
        assert int(own / 1e6) == parameters  # arXiv 2112.10752, tables 12 and 13
        names["scale_factor"] = torch.empty(())
        guess = recognise({name: tuple(tensor.shape) for name, tensor in names.items()}, {})
        assert (guess.family, guess.missing) == ("latent-diffusion", {})


class TestFirstStages:
    @pytest.mark.parametrize(
        "changes",
        [{}, {"codes": 0, "features": 4, "latents": 4}, {"attended": (2,)}, {"middle": False}, {"blocks": 2}],
        ids=lambda value: ",".join(value) or "VQ",
    )
    @torch.no_grad()
    def test_equal_diffusers(self, changes):
        shape = StageShape(**{**vars(VQ), **changes})
        state = stage_of(shape)
        assert StageShape.of({name: tuple(tensor.shape) for name, tensor in state.items()}, "x") == shape
        stage, coder = loaded(FirstStage(shape), state), coder_of(shape, under("first_stage_model.", state))
        z, image = torch.randn(2, shape.latents, 4, 6), torch.rand(2, 3, 16, 24) * 2 - 1
        made, found = Decode(stage)(z), Encode(stage)(image)
        assert 0.1 < float(made.std()) < 5
        torch.testing.assert_close(made, coder.decode(z).sample, rtol=1e-4, atol=1e-5)
        if shape.codes:
            torch.testing.assert_close(found, coder.encode(image).latents, rtol=1e-4, atol=1e-5)
        else:
            wanted = coder.encode(image).latent_dist
            torch.testing.assert_close(found, (wanted.mean, wanted.std), rtol=1e-4, atol=1e-5)

    def test_codes_are_taken_in_decode_alone(self, saved):
        source = load(saved(checkpoint(FACES, VQ)), size=8, **TOLD[FACES])
        codes = source.autoencoder.decode.quantize.embedding.weight
        image = torch.rand(1, 3, 16, 16) * 2 - 1
        z = source.autoencoder.encode(image)
        assert float(torch.cdist(z.movedim(1, -1).flatten(0, 2), codes).min()) > 1e-3
        at = codes[torch.arange(16)].T.reshape(1, 3, 4, 4)
        moved = at + 1e-3 * torch.randn(1, 3, 4, 4)
        assert torch.equal(source.autoencoder.decode(moved), source.autoencoder.decode(at))


class TestFiles:
    def test_averaged_and_plain_weights(self, state, plain, saved):
        path = saved(state)
        for ema, scale in ((None, 1), (True, 1), (False, 2)):
            source = load(path, size=8, num_head_channels=16, ema=ema)
            bias = state["model_ema.diffusion_modelout2bias"]
            assert torch.equal(source.network.out[2].bias, scale * bias)
            assert source.autoencoder is not None
        with pytest.raises(InputError, match="ema = true, but .* holds the plain weights alone"):
            load(saved(plain), size=8, num_head_channels=16, ema=True)

    def test_what_a_source_keeps(self, state, saved):
        source = load(saved(state), size="8,16", num_head_channels=16)
        assert (source.shape, source.family, source.name) == ((3, 8, 16), "latent-diffusion", "model.ckpt")
        assert (source.config["autoencoder"]["codes"], source.config["network"]["num_channels"]) == (64, 32)
        assert (source.training, source.prediction) == ({"steps": 500}, "epsilon")
        assert load(saved(state), size=8, num_head_channels=16, parameterization="x0").prediction == "x0"

    def test_pictures_of_256_pixels_unless_told(self, state, saved):
        source = load(saved(state), num_head_channels=16)
        assert source.shape == (3, 64, 64)
        assert any("256 × 256 was taken, latents of 64 × 64: --set size=" in note for note in source.notes)

    def test_safetensors_a_bare_state_dict_and_a_prefix(self, state, saved, tmp_path):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
        torch.save(under("ldm.", state), tmp_path / "x.pt")
        for name in ("x.safetensors", "x.pt"):
            source = load(tmp_path / name, size=8, num_head_channels=16)
            assert torch.equal(source.network.out[2].bias, state["model_ema.diffusion_modelout2bias"])
            assert source.autoencoder is not None

    def test_what_lightning_saves_beside_it(self, state, saved, monkeypatch):
        """The class of its callback is a key, which is not looked up, and the loss of the first stage is not read."""
        module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
        module.ModelCheckpoint = kind
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            monkeypatch.setitem(sys.modules, name, module)
        loss = {"first_stage_model.loss.logvar": torch.zeros(()), "first_stage_model.model_ema.decay": torch.ones(())}
        path = saved({**state, **loss}, callbacks={kind: {"best_model_score": torch.ones(()), "monitor": "val/loss"}})
        monkeypatch.undo()
        assert load(path, size=8, num_head_channels=16).training == {"steps": 500}
        assert look(path).command.startswith("epsrt export --from latent-diffusion")

    @pytest.mark.parametrize(
        ("schedule", "found"),
        [
            (Schedule("scaled-linear", 1000, 0.0015, 0.0155), None),
            (Schedule("linear", 400, 1e-4, 0.02), None),
            (Schedule("cosine", 100), None),
            (Schedule.given(np.linspace(0.001, 0.02, 100) ** 1.1), "given"),
        ],
        ids=["scaled-linear", "linear", "cosine", "given"],
    )
    def test_the_noise_is_that_of_the_file(self, state, saved, schedule, found):
        betas = torch.tensor(schedule.beta).float()
        source = load(saved({**state, "betas": betas}), size=8, num_head_channels=16)
        if found is None:
            assert source.schedule == schedule
        assert source.schedule.kind == (found or schedule.kind)
        np.testing.assert_allclose(source.schedule.alpha_bar, schedule.alpha_bar, rtol=1e-6)

    def test_inspect_gives_a_command_that_works(self, state, saved):
        path = saved(state)
        seen = look(path)
        assert (seen.problem, [name for name, _ in seen.missing]) == ("", ["num_heads"])
        assert seen.command == f"epsrt export --from latent-diffusion {path} model.epsrt --set num_heads=…"
        facts = dict(seen.facts)
        assert facts["autoencoder"] == "of 64 codes (VQ), 3 channels, pictures 4 times as large"
        assert facts["weights"].startswith("averaged (EMA), and plain ones")
        assert facts["classes"] == "none: unconditional"
        load(path, num_heads=4)
        missing = [name for name, _ in look(saved(checkpoint(CHURCHES, KL, ema=False))).missing]
        assert missing == ["num_heads", "scale_factor"]


class TestRefusals:
    def refused(self, path, message, kind=InputError, **options):
        with pytest.raises(kind, match=message) as error:
            load(path, **{"size": 8, "num_head_channels": 16, **options})
        assert "\n" not in str(error.value)

    def test_a_text(self, saved):
        """Of BERT or CLIP, whose encoder is the condition's model; what inspect says is what the export does."""
        state = checkpoint(ADMConfig(**{**vars(CLASSES), "num_classes": 5}), VQ)
        del state["cond_stage_model.embedding.weight"]
        state["cond_stage_model.transformer.token_emb.weight"] = torch.zeros(30, 24)
        path, message = saved(state), "takes a context in each step that its cond_stage_model makes, of a text say"
        self.refused(path, f"{message}.*give the context as a condition", num_heads=2)
        assert message in look(path).problem
        del state["cond_stage_model.transformer.token_emb.weight"]
        self.refused(saved(state), "cond_stage_model.embedding.weight is missing in it", BundleError)

    def test_a_second_image(self, plain, saved):
        first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 7, 3, 3)}
        self.refused(saved({**plain, **first}), "takes a second image in each step.*7 channels for both.*returns 3")

    def test_an_autoencoder_that_is_missing(self, plain, saved):
        path = saved({name: tensor for name, tensor in plain.items() if not name.startswith("first_stage_model.")})
        self.refused(path, "lacks first_stage_model.*--set autoencoder=false", BundleError)
        source = load(path, size=8, num_head_channels=16, autoencoder=False)
        assert (source.latents, source.autoencoder, source.value_range) == (True, None, (-4.0, 4.0))
        self.refused(path, "does not say size: give the height and width of its latents", size=None, autoencoder=False)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            (StageShape(**{**vars(VQ), "features": 4, "latents": 4, "codes": 0}), "latents have 4 channels, and .* 3"),
            (None, "encoder.conv_in.weight is missing in it"),
        ],
        ids=["other channels", "damaged"],
    )
    def test_an_autoencoder_that_does_not_fit(self, plain, saved, shape, message):
        others = {name: tensor for name, tensor in plain.items() if not name.startswith("first_stage_model.")}
        stage = {"x": torch.zeros(1)} if shape is None else stage_of(shape)
        path = saved({**others, **under("first_stage_model.", stage)})
        self.refused(path, f"{message}.*--set autoencoder=false", (InputError, BundleError))
        assert message.split(" ")[-1] in look(path).problem
        assert load(path, size=8, num_head_channels=16, autoencoder=False).autoencoder is None

    @pytest.mark.parametrize("cut", [0.5, 0.99])
    def test_a_file_that_is_cut_off(self, plain, saved, cut):
        path = saved(plain)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut * len(whole))])
        self.refused(path, "is not a whole file of torch.save", BundleError)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"betas": None},
                "lacks betas, the noise that its network was trained on: save the state dict of the whole",
            ),
            ({"betas": torch.zeros(2, 2)}, "betas must be a list of numbers"),
            ({"betas": torch.full((9,), 2.0)}, r"beta\[0\] = 2 is outside"),
            ({"scale_factor": torch.ones(3)}, r"its scale_factor has shape \[3\], and is one number"),
            (
                {"model.diffusion_model.out.2.bias": None},
                "has 3|lacks the tensor out.2.bias|which no network of OpenAI's",
            ),
            ({"model.diffusion_model.out.0.bias": None}, "lacks the tensor out.0.bias"),
            (
                {"first_stage_model.encoder.mid.block_1.norm1.bias": None},
                "lacks the tensor encoder.mid.block_1.norm1.bias",
            ),
            ({"first_stage_model.decoder.more": torch.zeros(1)}, "has a tensor decoder.more"),
            ({"first_stage_model.encoder.more": torch.eye(2).to_sparse()}, "is torch.sparse_coo, not a tensor"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_tensors(self, plain, saved, changes, message):
        state = {name: tensor for name, tensor in {**plain, **changes}.items() if tensor is not None}
        self.refused(saved(state), message, (InputError, BundleError))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_head_channels": None}, "does not say num_heads: give num_heads or num_head_channels of its conf"),
            ({"num_head_channels": 7}, "num_head_channels = 7 does not divide the 64 channels"),
            ({"num_head_channels": "many"}, "num_head_channels = 'many' is not a whole number"),
            ({"size": 7}, "size = 7,7 does not suit the network, which takes multiples of 2"),
            ({"num_classes": 3}, "num_classes = 3 contradicts .* which has no labels: leave it out"),
            ({"parameterization": "v"}, "parameterization 'v' is unknown: use one of eps, x0"),
            ({"scale_factor": "much"}, "scale_factor = 'much' is not a number"),
            ({"autoencoder": "no"}, "autoencoder = 'no' is not true or false"),
            ({"image_size": 8}, "latent-diffusion takes no option 'image_size'"),
        ],
    )
    def test_options(self, plain, saved, options, message):
        self.refused(saved(plain), message, **options)

    def test_a_scale_that_no_tensor_shows_or_contradicts(self, saved):
        state = checkpoint(CHURCHES, KL, ema=False)
        told = {"num_heads": 4, "num_head_channels": None}
        self.refused(saved(state), "does not say scale_factor: give that of its configuration", **told)
        assert load(saved(state), size=8, num_heads=4, scale_factor=0.18215).autoencoder.scales == (0.18215,)
        path = saved({**state, "scale_factor": torch.tensor(0.25)})
        assert load(path, size=8, num_heads=4, scale_factor=0.25).autoencoder.scales == (0.25,)
        self.refused(path, "scale_factor = 0.5 contradicts .*, which has 0.25: leave it out", scale_factor=0.5, **told)

    def test_a_table_of_labels(self, saved):
        state = checkpoint(ADMConfig(**{**vars(CLASSES), "num_classes": 5}), VQ, ema=False)
        message = 'num_classes = 3 contradicts .* a table of 5 labels: give 5, or 4 if the last means "none"'
        self.refused(saved(state), message, num_heads=2, num_head_channels=None, num_classes=3)
        state["cond_stage_model.embedding.weight"] = torch.zeros(5, 8)
        self.refused(saved(state), "has rows of 8 numbers, and the network attends to 24", BundleError)

    def test_other_files(self, saved):
        self.refused(saved({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}), "no network of this fam", BundleError)
        alone = saved({"first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)})
        assert "no network of latent diffusion: export the network from Python" in look(alone).problem

    def test_other_families_name_this_one(self, plain, saved):
        with pytest.raises(InputError, match="is a checkpoint of latent diffusion: say --from latent-diffusion"):
            families.load(
                "improved-diffusion", saved(plain), flags="--image_size 8 --num_channels 32 --channel_mult 1,2"
            )


def test_every_tensor_of_a_label_counts(saved):
    """Nothing that a checkpoint has is ignored, but what a context of one vector cannot use."""
    config = ADMConfig(**{**vars(CLASSES), "num_classes": 5})
    network = loaded(ADMUNet(config), weights(config))
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    network.requires_grad_(True)
    network(x, t, label).square().sum().backward()
    idle = {name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert {re.sub(r".*\.transformer_blocks\.\d\.", "", name) for name in idle} == {
        "attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias",
    }  # fmt: skip


def test_a_network_without_labels_takes_none():
    assert isinstance(ADMUNet(FACES).middle_block[1], nn.Module)
    with pytest.raises(InputError, match="5 classes and no label do not fit"):
        ADMUNet(ADMConfig(**{**vars(CLASSES), "num_classes": 5}))(torch.zeros(1, 3, 8, 8), torch.zeros(1))
