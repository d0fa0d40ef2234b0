"""What a Source and an export are given: each wrong type is one sentence, and NumPy's numbers are numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from epsrt import EpsrtError, Sampler, Schedule
from epsrt.manifest import Sampling
from epsrt_export import export, export_network
from epsrt_export.source import Source
from nets import tiny

SHAPE = (1, 8, 8)


def source(**facts):
    kind = {"network": nn.Identity(), "schedule": Schedule(T=20), "shape": SHAPE}
    return Source(**{**kind, **facts})


class TestSource:
    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"network": None}, "network is a NoneType, not a Module"),
            ({"schedule": "linear"}, "schedule is a str, not a Schedule"),
            ({"sampling": {"method": "ddim"}}, "sampling is a dict, not a Sampling"),
            ({"shape": 8}, "shape = 8 is not whole numbers, C and the extents"),
            ({"shape": "188"}, "shape = '188' is not whole numbers"),
            ({"shape": (True, 8, 8)}, "shape = True is not a whole number"),
            ({"shape": (1, 8, 10**12)}, "is not C and one to three extents, each 1 … 65536"),
            ({"classes": "3"}, "classes = '3' is not a whole number"),
            ({"classes": True}, "classes = True is not a whole number"),
            ({"classes": 3, "null_label": 1.5}, "null_label = 1.5 is not a whole number"),
            ({"value_range": 5}, "value_range = 5 is not two numbers, such as"),
            ({"value_range": ("a", "b")}, "value_range = .'a', 'b'. is not two numbers"),
            ({"value_range": (0.0, np.inf), "clip": None}, "is not two finite numbers"),
            ({"classes": 3, "class_names": "abc"}, "class_names = 'abc' is not a list of words"),
            ({"classes": 2, "class_names": (1, 2)}, "class_names = 1 is not a word"),
            ({"variance": ["learned"]}, "variance = ..learned.. is not a word"),
            ({"name": None}, "name = None is not a word"),
            ({"family": 5}, "family = 5 is not a word"),
            ({"origin": "\ud800"}, "origin cannot be written as JSON"),
            ({"config": [1]}, "config is a list, not a dict of plain values"),
            ({"config": {"a": torch.zeros(1)}}, "config cannot be written as JSON .*Tensor.*: give numbers, words"),
            ({"config": {"a": np.float32(1)}}, "config cannot be written as JSON .*float32"),
            ({"training": {1: 2}}, "training cannot be written as JSON .*str keys"),
        ],
    )
    def test_wrong_types(self, facts, message):
        with pytest.raises(EpsrtError, match=message):
            source(**facts)

    @pytest.mark.parametrize(
        ("sampling", "message"),
        [
            (Sampling("ddim", "5"), "Expected `int | null`, got `str`"),
            (Sampling("ddim", np.int64(5)), "int64.*: give Python's own numbers"),
            (Sampling("ddim", options=None), "Expected `object`, got `null`"),
            (Sampling("ddim", options={"eta": [1]}), "got `array`"),
            # what a plan takes only where its method does: a slip would go unseen
            (
                Sampling("heun", options={"s_chrun": 40}),
                "no method .* takes the option 's_chrun' .*: did you mean s_churn",
            ),
            (Sampling("ddim", options={"prediction": "v"}), "takes the option 'prediction'"),
            (Sampling("ddim", options={"s_churn": "x"}), "sampling's s_churn = 'x' is not a number"),
        ],
    )
    def test_samplings(self, sampling, message):
        with pytest.raises(EpsrtError, match=message.replace("|", "[|]")):
            source(sampling=sampling)

    def test_numpy_and_whole_floats_are_numbers(self):
        made = source(shape=np.array(SHAPE), classes=np.int64(3), null_label=3.0, value_range=np.array([0.0, 1.0]))
        assert (made.shape, made.classes, made.null_label, made.value_range) == (SHAPE, 3, 3, (0.0, 1.0))
        assert {type(n) for n in (*made.shape, made.classes, made.null_label)} == {int}

    def test_the_hash_of_weights_knows_which_is_which(self):
        """Two parameters of one shape, swapped, are another network."""
        a, b = nn.Bilinear(2, 2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        before = source(network=b).weights_sha256
        assert before == source(network=b).weights_sha256
        with torch.no_grad():
            first, second = (layer.weight.clone() for layer in b)
            b[0].weight.copy_(second)
            b[1].weight.copy_(first)
        assert source(network=b).weights_sha256 not in (before, source(network=a).weights_sha256)
        renamed = nn.ModuleDict({"x": b[0], "y": b[1]})
        assert source(network=renamed).weights_sha256 != source(network=b).weights_sha256

    @pytest.mark.parametrize("guidance", [float("inf"), -float("inf"), float("nan")])
    def test_guidance_that_is_not_finite(self, guidance):
        with pytest.raises(EpsrtError, match="guidance"):
            source(sampling=Sampling("ddim", guidance=guidance))

    def test_the_hash_of_weights_of_any_dtype(self):
        hashes = {source(network=nn.Linear(2, 2).to(dtype)).weights_sha256 for dtype in (torch.bfloat16, torch.float64)}
        assert len(hashes) == 2


class TestExport:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_batch": "2"}, "max_batch = '2' is not a whole number"),
            ({"max_batch": True}, "max_batch = True is not a whole number"),
            ({"precisions": [["fp32"]]}, "choose from fp32, fp16"),
            ({"sizes": 8}, "sizes = 8 is not .multiple, largest."),
            ({"sizes": (8,)}, "sizes = .8,. is not .multiple, largest."),
            ({"sizes": ("8", "16")}, "sizes = '8' is not a whole number"),
            ({"sizes": (True, 16)}, "sizes = True is not a whole number"),
        ],
    )
    def test_wrong_types(self, tmp_path, options, message):
        with pytest.raises(EpsrtError, match=message):
            export_network(tiny(), Schedule(T=20), tmp_path / "some.epsrt", shape=SHAPE, **options)
        assert not list(tmp_path.iterdir())

    def test_what_is_no_source(self, tmp_path):
        with pytest.raises(EpsrtError, match="a Tiny is no Source and no path: see families.load, or export_network"):
            export(tiny(), tmp_path / "some.epsrt")

    def test_weights_without_values(self, tmp_path):
        with pytest.raises(EpsrtError, match="stem.weight of Tiny is on the meta device, without values"):
            export_network(tiny().to("meta"), Schedule(T=20), tmp_path / "some.epsrt", shape=SHAPE)

    def test_bfloat16_and_numpy(self, tmp_path):
        """A copy in float32 is exported; the network stays what it was."""
        network = tiny().bfloat16().train()
        kind = {"shape": SHAPE, "precisions": ["fp32"], "max_batch": np.int64(2), "sizes": (np.int64(4), np.int64(16))}
        made = export_network(network, Schedule(T=20), tmp_path / "some.epsrt", **kind)
        assert (made.manifest.max_batch, made.manifest.sizes.multiple) == (2, 4)
        assert network.training
        assert network.head.weight.dtype == torch.bfloat16
        with Sampler.open(made.path, "onnxruntime", threads=1) as sampler:
            assert sampler.sample(1, steps=3, size=(4, 8)).shape == (1, 1, 4, 8)
