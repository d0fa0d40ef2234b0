"""Networks of improved- and guided-diffusion: equal to OpenAI's own, told by their flags, read without unpickling."""

import math
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
from foreign import guided_unet
from safetensors.torch import save_file
from torch import nn

from epsrt import BundleError, Condition, EpsrtError, Schedule
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.timesteps import spaced
from epsrt_export import export, export_network
from epsrt_export.families import load, openai
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.adm_shapes import Seen, seen
from epsrt_export.families.openai import guided, improved, recognise
from epsrt_export.families.openai_flags import command_line, flags_of
from epsrt_export.precision import half_copy
from epsrt_export.redraw import redraw
from epsrt_export.source import Source
from epsrt_export.stepgraph import check_network

SMALL = ADMConfig(
    image_size=16, num_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), num_heads=4
)
FLAGS = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "attention_resolutions": "8"}

# MODEL_FLAGS and DIFFUSION_FLAGS of the READMEs, and how many parameters the network has
PUBLISHED = {
    "cifar10_uncond_50M_500K": (
        "improved-diffusion", 52_546_438,
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine",
    ),
    "imagenet64_cond_270M_250K": (
        "improved-diffusion", 273_049_350,
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
        "--diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False --rescale_timesteps False",
    ),
    "lsun_uncond_100M_2400K_bs64": (
        "improved-diffusion", 113_676_678,
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
        "--rescale_learned_sigmas False --rescale_timesteps False --use_scale_shift_norm False",
    ),
    "64x64_diffusion": (
        "guided-diffusion", 295_904_454,
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True",
    ),
    "128x128_diffusion": (
        "guided-diffusion", 421_529_606,
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 True --use_scale_shift_norm True",
    ),
    "256x256_diffusion_uncond": (
        "guided-diffusion", 552_814_086,
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 True --use_scale_shift_norm True",
    ),
    "512x512_diffusion": (
        "guided-diffusion", 558_997_638,
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 False --use_scale_shift_norm True",
    ),
}  # fmt: skip


def config_of(family, **flags):
    return openai._network(family, flags_of(family, flags)[0])


def theirs(c: ADMConfig) -> nn.Module:
    """OpenAI's network of that shape, called as forward(t, x, y)."""
    return guided_unet()(
        c.image_size,
        c.in_channels,
        c.num_channels,
        c.in_channels * (1 + c.learn_sigma),
        c.num_res_blocks,
        [c.image_size // r for r in c.attention_resolutions],
        channel_mult=c.channel_mult,
        conv_resample=c.conv_resample,
        num_classes=c.num_classes or None,
        num_heads=c.num_heads,
        num_head_channels=c.num_head_channels,
        num_heads_upsample=c.num_heads_upsample,
        use_scale_shift_norm=c.use_scale_shift_norm,
        resblock_updown=c.resblock_updown,
        use_new_attention_order=c.use_new_attention_order,
    ).eval()


def drawn(shapes, seed=0):
    """A state dict as trained weights are: none zero, features of about one."""
    generator, state = torch.Generator().manual_seed(seed), OrderedDict()
    for name, tensor in shapes.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            state[name] = noise / math.sqrt(tensor[0].numel())
        else:
            state[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    return state


def ours(config, seed=0):
    network = ADMUNet(config)
    network.load_state_dict(drawn(network.state_dict(), seed))
    return network.eval()


def inputs(c, n=4, height=None, width=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c.in_channels, height or c.image_size, width or c.image_size, generator=generator)
    t = torch.linspace(0, 999, n).round()
    return x, t, *((torch.arange(n) % c.num_classes,) if c.num_classes else ())


def rel(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def small(**changes):
    return ADMConfig(**{**vars(SMALL), **changes})


@pytest.fixture
def saved(tmp_path):
    """saved(config, …) is a file as owners have it: an OrderedDict of tensors by torch.save."""

    def save(config=SMALL, seed=0, name="ema_0.9999_500000.pt", change=lambda state: state, **how):
        path = tmp_path / name
        torch.save(change(drawn(ADMUNet(config).state_dict(), seed)), path, **how)
        return path

    return save


class TestNetwork:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"use_new_attention_order": True},
            {"resblock_updown": True, "attention_resolutions": (16, 8)},
            {"use_scale_shift_norm": False},
            {"num_classes": 10},
            {"num_head_channels": 16},
            {"num_head_channels": 16, "use_new_attention_order": True, "resblock_updown": True, "num_classes": 3},
            {"num_heads_upsample": 2},
            {"conv_resample": False},
            {"learn_sigma": True, "dropout": 0.3},
            {"channel_mult": (0.5, 1, 3), "num_channels": 64, "num_res_blocks": 2},
            {"in_channels": 1, "channel_mult": (1,), "attention_resolutions": (7,)},
        ],
        ids=lambda changes: ",".join(changes) or "default",
    )
    def test_equals_openais_with_their_state_dict(self, changes):
        config = small(**changes)
        reference, network = theirs(config), ADMUNet(config).eval()
        state = drawn(reference.state_dict())
        reference.load_state_dict(state, strict=True)
        network.load_state_dict(state, strict=True)
        assert list(network.state_dict()) == list(state)
        assert seen({name: tuple(tensor.shape) for name, tensor in state.items()}, "it") == Seen.of(config)
        x, t, *label = inputs(config)
        with torch.no_grad():
            out, want = network(x, t, *label), reference(t, x, *label)
        assert out.shape == (4, config.in_channels * (1 + config.learn_sigma), 16, 16)
        assert 0.2 < float(want.square().mean().sqrt()) < 5
        assert rel(out, want) < 1e-6

    def test_other_heights_and_widths(self):
        config = small(use_new_attention_order=True)
        reference, network = theirs(config), ours(config)
        reference.load_state_dict(network.state_dict())
        x, t = inputs(config, 2, 8, 24)
        with torch.no_grad():
            assert rel(network(x, t), reference(t, x)) < 1e-6

    def test_time_and_heads_matter(self):
        """What has no weights of its own: were it without effect, the equalities above would prove little."""
        x, t = inputs(SMALL)
        with torch.no_grad():
            out = ours(SMALL)(x, t)
            assert rel(ours(SMALL)(x, t + 1), out) > 1e-3
            for changes in ({"num_heads": 2}, {"num_heads_upsample": 1}, {"use_new_attention_order": True}):
                assert rel(ours(small(**changes))(x, t), out) > 1e-3

    @pytest.mark.parametrize("changes", [{}, {"resblock_updown": True, "num_classes": 5, "learn_sigma": True}])
    def test_half_copy_computes_the_same(self, changes):
        config = small(**changes)
        network = ours(config)
        x, t, *label = inputs(config)
        with torch.no_grad():
            half = half_copy(network)(x.half(), t, *label)
            assert half.dtype == torch.float16
            assert rel(half, network(x, t, *label)) < 2e-3

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published_networks_have_their_tensors(self, name):
        family, parameters, flags = PUBLISHED[name]
        config = config_of(family, flags=flags)
        with torch.device("meta"):
            network, reference = ADMUNet(config), theirs(config)
        assert sum(p.numel() for p in network.parameters()) == parameters
        shapes, wanted = ({name: tensor.shape for name, tensor in n.state_dict().items()} for n in (network, reference))
        assert shapes == wanted

    def test_labels_are_asked_for(self):
        x, t = inputs(SMALL)
        with pytest.raises(EpsrtError, match="5 classes and no label do not fit"):
            ours(small(num_classes=5))(x, t)
        with pytest.raises(EpsrtError, match="0 classes and a label do not fit"):
            ours(SMALL)(x, t, torch.zeros(4, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_res_blocks": 0}, "num_res_blocks = 0 makes no network"),
            ({"num_res_blocks": 10**9}, "num_res_blocks = 1000000000 makes no network: give 1 … 256"),
            ({"num_channels": 10**9}, "num_channels = 1000000000 makes no network: give 1 … 65536"),
            ({"num_channels": 48}, "levels of [48, 96] channels: the norms need multiples of 32"),
            ({"channel_mult": ()}, "gives levels of [] channels"),
            ({"image_size": 9}, "image_size = 9 cannot be halved 1 times: shorten channel_mult"),
            ({"attention_resolutions": (8, 0)}, "attention_resolutions names 0"),
            ({"dropout": 1.0}, "dropout = 1.0 is outside"),
            ({"num_heads": 3}, "num_heads = 3 does not divide the 64 channels"),
            ({"num_heads_upsample": 0}, "num_heads_upsample = 0 does not divide"),
            ({"num_head_channels": 48}, "num_head_channels = 48 does not divide the 64 channels"),
        ],
    )
    def test_shapes_that_are_none(self, changes, message):
        with pytest.raises(EpsrtError) as error:
            small(**changes)
        assert message in str(error.value)


class TestFlags:
    def test_of_a_readme(self):
        family, _, flags = PUBLISHED["64x64_diffusion"]
        assert config_of(family, flags=flags) == ADMConfig(
            image_size=64,
            num_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(32, 16, 8),
            num_head_channels=64,
            num_classes=1000,
            learn_sigma=True,
            dropout=0.1,
            resblock_updown=True,
            use_new_attention_order=True,
        )
        family, _, flags = PUBLISHED["cifar10_uncond_50M_500K"]
        assert config_of(family, flags=flags) == ADMConfig(
            image_size=32, channel_mult=(1, 2, 2, 2), num_res_blocks=3, learn_sigma=True, dropout=0.3, time_scale=0.25
        )
        family, _, flags = PUBLISHED["512x512_diffusion"]
        assert config_of(family, flags=flags).widths == (128, 256, 256, 512, 512, 1024, 1024)

    def test_defaults_are_each_repositorys(self):
        assert config_of("guided-diffusion") == config_of("improved-diffusion") == ADMConfig()
        assert config_of("guided-diffusion", diffusion_steps=4000).time_scale == 1.0
        assert config_of("improved-diffusion", diffusion_steps=4000).time_scale == 0.25

    def test_values_are_of_any_kind(self):
        typed = {
            "class_cond": True,
            "num_classes": 7,
            "dropout": 0.5,
            "attention_resolutions": 8,
            "channel_mult": [1, 2],
        }
        texts = {
            "class_cond": "true",
            "num_classes": "7",
            "dropout": "0.5",
            "attention_resolutions": "8",
            "channel_mult": "1,2",
        }
        line = "--class_cond=yes --num_classes 7 --dropout 5e-1 --attention_resolutions 8 --channel_mult '1, 2'"
        first = config_of("guided-diffusion", **typed)
        assert first == config_of("guided-diffusion", **texts) == config_of("guided-diffusion", flags=line)
        assert (first.num_classes, first.attention_resolutions, first.channel_mult) == (7, (8,), (1, 2))
        assert config_of("guided-diffusion", flags=line, num_classes=9).num_classes == 9
        assert config_of("guided-diffusion", flags="--num_head_channels -1").num_head_channels == -1

    @pytest.mark.parametrize("T", [1000, 4000, 37])
    def test_schedules_are_the_papers(self, T):
        scale = 1000 / T  # get_named_beta_schedule
        linear = np.linspace(scale * 0.0001, scale * 0.02, T)
        np.testing.assert_array_equal(self.schedule(diffusion_steps=T).beta, linear)

        def bar(t):
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        cosine = [min(1 - bar((i + 1) / T) / bar(i / T), 0.999) for i in range(T)]
        schedule = self.schedule(diffusion_steps=T, noise_schedule="cosine")
        np.testing.assert_allclose(schedule.beta, cosine, rtol=1e-10)
        assert schedule == Schedule("cosine", T)

    @staticmethod
    def schedule(**flags):
        return openai._diffusion(flags_of("guided-diffusion", flags)[0])[0]

    @pytest.mark.parametrize(
        ("flags", "method", "visits", "variance", "count"),
        [
            ("", "ddpm", (1000, "trailing"), "fixed_large", 1000),
            ("--sigma_small True", "ddpm", (1000, "trailing"), "fixed_small", 1000),
            ("--learn_sigma True --timestep_respacing 250", "ddpm", (None, "250"), None, 250),
            ("--learn_sigma True --timestep_respacing '10, 10,15'", "ddpm", (None, "10,10,15"), None, 35),
            ("--learn_sigma True --timestep_respacing ddim25", "ddim", (None, "ddim25"), None, 25),
            ("--learn_sigma True --use_ddim True", "ddim", (1000, "trailing"), None, 1000),
            ("--use_ddim False --timestep_respacing ddim25", "ddpm", (None, "ddim25"), "fixed_large", 25),
            ("--use_ddim True --timestep_respacing 50 --sigma_small y", "ddim", (None, "50"), "fixed_small", 50),
        ],
    )
    def test_sampling_is_the_scripts(self, flags, method, visits, variance, count):
        schedule, found = openai._diffusion(flags_of("guided-diffusion", {"flags": flags})[0])
        assert (found.method, found.steps, found.spacing) == (method, *visits)
        assert found.options == {"rederive": True, **({"variance": variance} if variance else {})}
        assert schedule == Schedule("linear", 1000)
        assert len(spaced(schedule, *visits)) == count

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"path": 3}, "guided-diffusion has no flag 'path'"),
            ({"family": 3}, "guided-diffusion has no flag 'family'"),
            ({"num_chanels": 64}, "guided-diffusion has no flag 'num_chanels': did you mean num_channels"),
            ({"flags": "--num_chanels 64"}, "did you mean num_channels"),
            ({"flags": "--image_size"}, "flags go wrong at '--image_size'"),
            ({"flags": "--class_cond --image_size 64"}, "flags go wrong at '--class_cond'"),
            ({"flags": "image_size 64"}, "flags go wrong at 'image_size'"),
            ({"flags": "--channel_mult '1,2"}, "cannot be split into words (No closing quotation)"),
            ({"flags": 64}, "flags = 64 is not a word"),
            ({"class_cond": "maybe"}, "class_cond = 'maybe' is not true or false"),
            ({"image_size": "64px"}, "image_size = '64px' is not a whole number"),
            ({"image_size": 64.5}, "image_size = 64.5 is not a whole number"),
            ({"dropout": "much"}, "dropout = 'much' is not a number"),
            ({"channel_mult": "1;2"}, "channel_mult = '1;2' is not a list of numbers"),
            ({"attention_resolutions": "16,x"}, "attention_resolutions = '16,x' is not a list of numbers"),
            ({"image_size": 32}, "no channel_mult for image_size = 32, only for 64, 128, 256, 512"),
            ({"num_classes": 10}, "num_classes = 10 is for networks with class_cond"),
            ({"class_cond": True, "num_classes": 0}, "num_classes = 0 makes no class"),
            ({"diffusion_steps": 0}, "diffusion_steps = 0 makes no diffusion"),
            ({"diffusion_steps": 10}, "diffusion_steps = 10 is too few for a linear noise_schedule"),
            ({"noise_schedule": "cosin"}, "noise_schedule 'cosin' is unknown: did you mean cosine"),
            ({"timestep_respacing": "leading"}, "timestep_respacing = 'leading' is none: write 250"),
            ({"timestep_respacing": "ddim333"}, "no whole stride visits 333 of 1000 timesteps"),
            ({"timestep_respacing": 2000}, "2000 is outside 1 … 1000"),
            ({"flags": "--large_size 256 --small_size 64"}, "large_size is a flag of an upsampler (super-resolution)"),
            (
                {"flags": "python super_res_sample.py --num_channels 192"},
                "super_res_sample.py is the script of an upsam",
            ),
            ({"iterations": 300000}, "iterations is a flag of a classifier's training"),
            (
                {"flags": "mpiexec -n 8 python scripts/classifier_train.py --lr 3e-4"},
                "classifier_train.py is the script",
            ),
            ({"flags": "$MODEL_FLAGS --lr 1e-4"}, "name $MODEL_FLAGS, which only your shell knows: paste its value"),
            (
                {"flags": "--image_size $SIZE"},
                "name $SIZE, which only your shell knows: paste its value instead, or the line SIZE=…",
            ),
            (
                {"flags": "python a.py --lr 1 python b.py --lr 2"},
                "flags hold 2 command lines, of a.py and b.py: give one",
            ),
            ({"size": "9,16"}, "size = 9,16 does not suit the network, which takes multiples of 8"),
        ],
    )
    def test_refusals_come_before_the_file_is_read(self, tmp_path, flags, message):
        with pytest.raises(EpsrtError) as error:
            guided(tmp_path / "none.pt", **flags)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_guideds_flags_are_not_improveds(self, tmp_path):
        with pytest.raises(
            EpsrtError, match="resblock_updown is a flag of guided-diffusion, not of improved-diffusion"
        ):
            improved(tmp_path / "none.pt", resblock_updown=True)
        with pytest.raises(EpsrtError, match="only for 32, 64, 256"):
            improved(tmp_path / "none.pt", image_size=128)


class TestCommandLines:
    """As the READMEs have them: variables, then the script's line."""

    FLAGS = "--image_size 64 --learn_sigma True"

    @pytest.mark.parametrize(
        "text",
        [
            FLAGS,
            f"python scripts/image_sample.py {FLAGS}",
            f"mpiexec -n $NUM_GPUS python scripts/image_train.py {FLAGS}",
            f"$ OPENAI_LOGDIR=/tmp/x CUDA_VISIBLE_DEVICES=0 python -m image_sample.py {FLAGS}",
            "python image_sample.py \\\n    --image_size 64 \\\n    --learn_sigma=True",
            f'MODEL_FLAGS="{FLAGS}"\npython classifier_sample.py $MODEL_FLAGS',
            f'export MODEL_FLAGS="{FLAGS}"; python image_sample.py ${{MODEL_FLAGS}}'.replace(";", "\n"),
            'MODEL_FLAGS="--image_size 64"\nDIFFUSION_FLAGS="--learn_sigma True"',
        ],
    )
    def test_forms(self, text):
        assert command_line(text) == {"image_size": "64", "learn_sigma": "True"}

    def test_a_variable_that_the_command_leaves_out(self):
        text = 'A="--image_size 64"\nB="--lr 3"\npython image_sample.py $A'
        assert command_line(text) == {"image_size": "64"}

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_of_the_published_networks(self, name):
        family, _, flags = PUBLISHED[name]
        line = (
            f'MODEL_FLAGS="{flags}"\nSAMPLE_FLAGS="--batch_size 4 --num_samples 100 --timestep_respacing 250"\n'
            f"mpiexec -n 8 python scripts/image_sample.py --model_path models/{name}.pt $MODEL_FLAGS $SAMPLE_FLAGS"
        )
        found, aside = flags_of(family, {"flags": line})
        assert aside == {"model_path": f"models/{name}.pt"}
        assert openai._network(family, found) == config_of(family, flags=flags)
        assert openai._diffusion(found)[1].spacing == "250"

    def test_a_training(self):
        line = "python scripts/image_train.py --data_dir $DATA --resume_checkpoint m.pt --image_size 64 --lr 1e-4"
        found, aside = flags_of("improved-diffusion", {"flags": line})
        assert (found["lr"], aside) == (1e-4, {"data_dir": "$DATA", "resume_checkpoint": "m.pt"})
        assert "data_dir" not in found

    def test_notes(self, saved):
        path = saved()
        assert guided(path, **FLAGS, flags=f"--model_path elsewhere/{path.name}").notes == ()
        classifier = "--classifier_scale 1.0 --classifier_path c.pt --model_path models/64x64_diffusion.pt"
        source = guided(path, **FLAGS, flags=f"python classifier_sample.py {classifier}")
        named, judged = source.notes
        assert named == "the flags name model_path models/64x64_diffusion.pt, and what is read is ema_0.9999_500000.pt"
        assert judged.startswith("classifier_scale, classifier_path are of a classifier to guide by, which is not in")
        assert not any("classifier" in name or name == "model_path" for name in source.config)

    def test_plain_weights_of_a_training(self, saved):
        (note,) = guided(saved(name="model200000.pt"), **FLAGS).notes
        assert "in ema_RATE_200000.pt" in note
        assert guided(saved(name="ema_0.9999_200000.pt"), **FLAGS).notes == ()

    def test_classifiers_are_guideds(self, saved):
        with pytest.raises(EpsrtError, match="classifier_scale is a flag of guided-diffusion, not of improved"):
            improved(saved(), **FLAGS, classifier_scale=1.0)


class TestRecognised:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published_networks(self, name):
        """What is printed exports the network, but for what has no weights."""
        family, _, flags = PUBLISHED[name]
        want = config_of(family, flags=flags)
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in ADMUNet(want).state_dict().items()}
        guess = recognise(shapes, {})
        found = config_of(guess.family, **guess.options)
        unseen = ("num_heads", "num_head_channels", "use_new_attention_order", "dropout", "time_scale")
        assert Seen.of(found) == Seen.of(want)
        assert {k: v for k, v in vars(found).items() if k not in unseen} == {
            k: v for k, v in vars(want).items() if k not in unseen
        }
        assert list(guess.missing) == ["num_heads", "diffusion_steps"]
        assert f"{want.num_channels} channels" in guess.facts["network"]

    def test_a_size_that_is_unknown(self):
        shapes = {name: tuple(tensor.shape) for name, tensor in ADMUNet(SMALL).state_dict().items()}
        guess = recognise(shapes, {})
        assert {"image_size", "attention_resolutions"} < set(guess.missing)
        assert guess.missing["attention_resolutions"] == "image_size divided by 2"
        assert "attention_resolutions" not in guess.options["flags"]

    def test_what_no_family_reads(self):
        shapes = {name: tuple(tensor.shape) for name, tensor in ADMUNet(SMALL).state_dict().items()}
        shapes["input_blocks.0.0.weight"] = (32, 6, 3, 3)
        guess = recognise(shapes, {})
        assert guess.family == ""
        assert guess.facts["network"].startswith("it takes a second image in each step")

    def test_odd_names(self):
        """None of them makes a network, nor takes long to look at."""
        shapes = {name: tuple(tensor.shape) for name, tensor in ADMUNet(SMALL).state_dict().items()}
        names = (
            "output_blocks.0",
            "input_blocks.x.y",
            "input_blocks.900000000.0.weight",
            f"input_blocks.{'9' * 5000}.0",
        )
        for name in names:
            assert recognise({**shapes, name: (1,)}, {}) == recognise(shapes, {})
        few = {name: shape for name, shape in shapes.items() if not name.startswith(("output_blocks.", "out."))}
        for odd in (few, {**few, "input_blocks.99999.0.weight": (1,)}):
            assert recognise(odd, {}) is None
        assert recognise({**shapes, "time_embed.0.weight": ()}, {}) is None

    def test_others(self):
        assert recognise({"conv_in.weight": (32, 3, 3, 3)}, {}) is None


class TestSources:
    def test_of_guided(self, saved):
        config = small(num_classes=10, learn_sigma=True, resblock_updown=True)
        path = saved(config)
        flags = {
            **FLAGS,
            "class_cond": "True",
            "num_classes": 10,
            "learn_sigma": True,
            "resblock_updown": True,
            "noise_schedule": "cosine",
            "timestep_respacing": 250,
            "use_fp16": True,
            "lr": "1e-4",
        }
        source = load("guided-diffusion", path, **flags)
        assert (source.shape, source.classes, source.null_label) == ((3, 16, 16), 10, None)
        assert (source.prediction, source.variance, source.clip) == ("epsilon", "learned_range", 1.0)
        assert source.schedule == Schedule("cosine", 1000)
        assert source.sampling == Sampling("ddpm", None, "250", {"rederive": True})
        assert (source.family, source.name) == ("guided-diffusion", "ema_0.9999_500000.pt")
        assert source.sha256 == sha256(path)
        assert source.config["channel_mult"] == "1,2"
        assert (source.config["use_fp16"], source.config["lr"], source.config["num_heads"]) == (True, 1e-4, 4)
        x, t, label = inputs(config)
        with torch.no_grad():
            assert torch.equal(source.network(x, t, label), ours(config)(x, t, label))
        assert not source.network.training

    def test_of_improved_rescales_the_timesteps(self, saved):
        source = load("improved-diffusion", saved(), **FLAGS, diffusion_steps=4000, predict_xstart=True, sigma_small=1)
        assert (source.prediction, source.variance, source.classes) == ("x0", None, 0)
        assert source.sampling.options["variance"] == "fixed_small"
        reference = theirs(SMALL)
        reference.load_state_dict(ours(SMALL).state_dict())
        x, _ = inputs(SMALL)
        t = torch.tensor([0, 1, 1999, 3999])
        with torch.no_grad():
            assert rel(source.network(x, t), reference(t.float() * (1000.0 / 4000), x)) < 1e-6
            plain = improved(saved(), **FLAGS, diffusion_steps=4000, rescale_timesteps=False)
            assert rel(plain.network(x, t), reference(t, x)) < 1e-6

    def test_sizes_that_are_not_square(self, saved):
        source = guided(saved(), **FLAGS, size="8,24")
        assert (source.shape, source.config["image_size"]) == ((3, 8, 24), 16)
        reference = theirs(SMALL)
        reference.load_state_dict(ours(SMALL).state_dict())
        x, t = inputs(SMALL, 2, 8, 24)
        with torch.no_grad():
            assert rel(source.network(x, t), reference(t, x)) < 1e-6

    def test_wrappers_prefixes_and_averages(self, saved):
        def trained(state):
            average = {f"_orig_mod.module.{name}": 2 * tensor for name, tensor in state.items()}
            return {"model": state, "ema": average, "step": 500}

        path, want = saved(change=trained), ours(SMALL).state_dict()["out.2.bias"]
        for ema, scale in ((None, 2), (True, 2), (False, 1)):
            source = guided(path, **FLAGS, ema=ema)
            assert torch.equal(source.network.state_dict()["out.2.bias"], scale * want)
        assert any("plain" in note for note in source.notes)

    def test_latents(self, saved):
        """What is not bounded to −1 … 1 is not clipped, unless somebody says so."""
        path = saved(small(in_channels=4))
        source = guided(path, **FLAGS, in_channels=4)
        assert (source.latents, source.value_range, source.clip) == (True, (-4.0, 4.0), None)
        assert any("taken for an autoencoder's latents" in note for note in source.notes)
        assert guided(path, **FLAGS, in_channels=4, clip_denoised=True).clip == 1.0
        source = guided(path, **FLAGS, in_channels=4, latents=False)
        assert (source.latents, source.value_range, source.clip) == (False, (-1.0, 1.0), 1.0)

    def test_clip_denoised(self, saved):
        assert guided(saved(), **FLAGS).clip == 1.0
        assert guided(saved(), **FLAGS, clip_denoised=False).clip is None

    def test_files_of_every_kind_give_the_same(self, saved, tmp_path):
        want = ours(SMALL).state_dict()

        def distributed(state):
            return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())

        paths = [
            saved(),
            saved(name="old.pt", _use_new_zipfile_serialization=False),
            saved(name="parallel.pth", change=distributed),
            saved(name="double.pt", change=lambda state: {name: tensor.double() for name, tensor in state.items()}),
        ]
        save_file(dict(want), tmp_path / "weights.safetensors")
        for path in (*paths, tmp_path / "weights.safetensors"):
            found = guided(path, **FLAGS).network.state_dict()
            assert list(found) == list(want)
            assert all(torch.equal(found[name], want[name]) for name in want)
            assert {tensor.dtype for tensor in found.values()} == {torch.float32}

    def test_half_weights_become_float32(self, saved):
        path = saved(change=lambda state: OrderedDict((name, tensor.half()) for name, tensor in state.items()))
        found = guided(path, **FLAGS).network.state_dict()
        want = ours(SMALL).state_dict()
        assert all(torch.equal(found[name], want[name].half().float()) for name in want)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class TestFilesThatAreRefused:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_hostile_pickle_is_not_run(self, saved, tmp_path, zipped):
        mark = tmp_path / "mark"
        path = saved(change=lambda state: {**state, "step": Hostile(mark)}, _use_new_zipfile_serialization=zipped)
        with pytest.raises(BundleError, match=r"holds (posix|nt).mkdir, which loading would run, .*model.state_dict"):
            guided(path, **FLAGS)
        assert not mark.exists()
        torch.load(path, weights_only=False)  # it would have been
        assert mark.exists()

    @pytest.mark.parametrize("zipped", [True, False])
    def test_damage(self, saved, zipped):
        path = saved(_use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for raw in (whole[: len(whole) // 2], whole[:200], b"", b"hello", b"<!DOCTYPE html>", b"PK\x03\x04"):
            path.write_bytes(raw)
            with pytest.raises(BundleError, match="is not a whole file of torch.save .*: copy it again"):
                guided(path, **FLAGS)

    def test_places(self, tmp_path):
        with pytest.raises(BundleError, match="none.pt does not exist"):
            guided(tmp_path / "none.pt", **FLAGS)
        with pytest.raises(BundleError, match="is a directory: give the file of weights"):
            guided(tmp_path, **FLAGS)
        (tmp_path / "x.safetensors").write_bytes(b"hello")
        with pytest.raises(BundleError, match="is not a whole safetensors file"):
            guided(tmp_path / "x.safetensors", **FLAGS)

    @pytest.mark.parametrize(
        ("changes", "wrong"),
        [
            ({"num_channels": 64}, ["num_channels"]),
            ({"channel_mult": (1, 3)}, ["channel_mult"]),
            ({"channel_mult": (1, 2, 2)}, ["channel_mult"]),
            ({"num_res_blocks": 2}, ["num_res_blocks"]),
            ({"attention_resolutions": (16,)}, ["attention_resolutions"]),
            ({"attention_resolutions": (5,)}, ["attention_resolutions"]),
            ({"resblock_updown": True}, ["resblock_updown"]),
            ({"conv_resample": False}, ["conv_resample"]),
            ({"use_scale_shift_norm": False}, ["use_scale_shift_norm"]),
            ({"num_classes": 10}, ["class_cond", "num_classes"]),
            ({"learn_sigma": True}, ["learn_sigma"]),
            ({"in_channels": 1}, ["in_channels"]),
            ({"num_channels": 64, "learn_sigma": True}, ["num_channels", "learn_sigma"]),
        ],
        ids=lambda value: ",".join(value),
    )
    def test_other_networks_name_the_flags_to_give(self, saved, changes, wrong):
        path = saved(small(**changes))
        with pytest.raises(EpsrtError) as error:
            guided(path, **FLAGS)
        said = str(error.value)
        assert "\n" not in said
        assert "does not fit its flags: they say " in said
        assert ("or the image_size" in said) == bool({"channel_mult", "attention_resolutions"} & set(wrong))
        way_out = said.split(": give ")[1].split(", or the image_size")[0]
        given = dict(word.split("=") for word in way_out.split())
        assert list(given) == wrong
        assert guided(path, **{**FLAGS, **given}).shape[1:] == (16, 16)

    def test_fewer_classes(self, saved):
        with pytest.raises(EpsrtError, match=r"they say num_classes=1000, .* others: give num_classes=10$"):
            guided(saved(small(num_classes=10)), **FLAGS, class_cond=True)

    def test_guideds_network_in_improved(self, saved):
        path = saved(small(resblock_updown=True))
        with pytest.raises(EpsrtError, match="has resblock_updown True: say --from guided-diffusion"):
            improved(path, **FLAGS)

    @pytest.mark.parametrize("out", [3, 6])
    def test_upsamplers(self, saved, out):
        """Their SuperResModel has twice the channels at its entrance."""

        def upsampler(state):
            first, last = "input_blocks.0.0.weight", "out.2"
            state[first] = torch.cat([state[first]] * 2, 1)
            for name in (f"{last}.weight", f"{last}.bias"):
                state[name] = torch.cat([state[name]] * (out // 3))
            return state

        message = f"takes a second image in each step, .* 6 channels for both together and returns {out}"
        with pytest.raises(EpsrtError, match=message):
            guided(saved(change=upsampler), **FLAGS)

    def test_upsamplers_way_out(self):
        class Adapter(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, t):
                return self.net(t, x)

        theirs = guided_unet()(16, 6, 32, 3, 1, (2,), channel_mult=(1, 2), num_heads=2).eval()
        small = Condition("small", (3, 16, 16), "float32", "image")
        source = Source(Adapter(theirs).eval(), Schedule("cosine", 40), (3, 16, 16), conditions=[small])
        check_network(source.network, source.shape, source.conditions, torch.float32)

    def test_classifiers(self, saved):
        path = saved(change=lambda state: {k: v for k, v in state.items() if not k.startswith("output_blocks.")})
        with pytest.raises(EpsrtError, match="is of a classifier of noised images .*: give the file of a diffusion"):
            guided(path, **FLAGS)

    def test_contexts(self, saved):
        name = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        with pytest.raises(EpsrtError, match="takes a context in each step, such as text"):
            guided(saved(change=lambda state: {**state, name: torch.zeros(8, 768)}), **FLAGS)

    @pytest.mark.parametrize("shape", [(), (32,), (128, 0)])
    def test_shapes_that_are_none(self, saved, shape):
        path = saved(change=lambda state: {**state, "time_embed.0.weight": torch.zeros(shape)})
        with pytest.raises(BundleError, match="it is damaged, or of code that was changed"):
            guided(path, **FLAGS)

    def test_blocks_that_are_missing(self, saved):
        path = saved(change=lambda state: {k: v for k, v in state.items() if not k.startswith("output_blocks.3.")})
        with pytest.raises(BundleError, match="has 3 output_blocks on 2 levels, which no network of OpenAI's has"):
            guided(path, **FLAGS)

    def test_three_dimensions_and_their_way_out(self, tmp_path):
        theirs = guided_unet()(8, 2, 32, 2, 1, (2,), channel_mult=(1, 2), dims=3, num_heads=2).eval()
        torch.save(theirs.state_dict(), tmp_path / "video.pt")
        with pytest.raises(
            EpsrtError, match=r"3-dimensional data, .*unflatten\(2, \(depth, -1\)\), t\).flatten\(2, 3\)$"
        ):
            guided(tmp_path / "video.pt", **FLAGS)

        class Adapter(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, t):
                return self.net(t, x.unflatten(2, (4, -1))).flatten(2, 3)

        check_network(Adapter(theirs), (2, 32, 8), (), torch.float32)

    def test_one_dimension_and_its_way_out(self, tmp_path):
        theirs = guided_unet()(16, 2, 32, 2, 1, (2,), channel_mult=(1, 2), dims=1, num_heads=2).eval()
        torch.save(theirs.state_dict(), tmp_path / "audio.pt")
        with pytest.raises(EpsrtError, match=r"1-dimensional data, .*self.net\(x\[:, :, 0\], t\)\[:, :, None\]$"):
            guided(tmp_path / "audio.pt", **FLAGS)

        class Adapter(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, t):
                return self.net(t, x[:, :, 0])[:, :, None]

        schedule = Schedule("cosine", 40)
        theirs.load_state_dict(drawn(theirs.state_dict()))
        theirs.out[2].weight.data *= 0.05  # all of it would make trajectories chaotic
        options = {"shape": (2, 1, 16), "precisions": ("fp32",), "max_batch": 2}
        bundle = export_network(Adapter(theirs), schedule, tmp_path / "audio.epsrt", **options)
        assert bundle.manifest.shape == (2, 1, 16)

    def test_whole_numbers_are_no_weights(self, saved):
        path = saved(change=lambda state: {name: tensor.to(torch.int32) for name, tensor in state.items()})
        with pytest.raises(BundleError, match="time_embed.0.weight holds torch.int32, the network torch.float32"):
            guided(path, **FLAGS)


def test_export_of_a_learned_sigma_and_classes(tmp_path):
    """Every field of the source reaches the bundle, and the gate passes."""
    shape = {"image_size": 8, "num_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_classes": 4}
    config = ADMConfig(**shape, attention_resolutions=(4,), resblock_updown=True, use_new_attention_order=True)
    state = redraw(ADMUNet(config), Schedule("cosine", 40), (3, 8, 8), classes=4).state_dict()
    generator = torch.Generator().manual_seed(3)
    for name, size in (("out.2.weight", 0.05), ("out.2.bias", 0.5)):  # the fraction between the variances
        state[name] = torch.cat([state[name], size * torch.randn(state[name].shape, generator=generator)])
    torch.save(OrderedDict(state), tmp_path / "model.pt")
    source = guided(
        tmp_path / "model.pt",
        image_size=8,
        num_channels=32,
        channel_mult="1,2",
        num_res_blocks=1,
        class_cond=True,
        num_classes=4,
        attention_resolutions=4,
        resblock_updown=True,
        use_new_attention_order=True,
        learn_sigma=True,
        diffusion_steps=40,
        noise_schedule="cosine",
        rescale_timesteps=True,
        timestep_respacing="20",
    )
    bundle = export(source, tmp_path / "x.epsrt", precisions=("fp32",), max_batch=2)
    m = bundle.manifest
    assert (m.shape, m.classes, m.variance, m.clip) == ((3, 8, 8), 4, "learned_range", 1.0)
    assert (m.schedule, m.sampling) == (Schedule("cosine", 40), Sampling("ddpm", None, "20", {"rederive": True}))
    assert (m.provenance.family, m.provenance.source) == ("guided-diffusion", "model.pt")
    assert all(rung.passed for rung in bundle.parity())
