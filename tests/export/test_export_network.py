"""epsrt_export.export_network: networks in, proven bundles out, all of it or nothing."""

import dataclasses
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from epsrt import Bundle, BundleError, EpsrtError, InputError, Sampler, Schedule, noise
from epsrt.manifest import GOLDEN, MANIFEST, PARITY, SIGNATURE
from epsrt.timesteps import spaced
from epsrt.verify import verify
from epsrt_export import ParityError, export_network, families, golden
from epsrt_export import export as export_function
from epsrt_export import parity as parity_module
from epsrt_export.families import checkpoint as own
from epsrt_trainer.checkpoint import load_checkpoint, save_checkpoint
from epsrt_trainer.sample import ddim_loop
from helpers import AT_EXPORT, externals, run_python, tree
from nets import Tiny, damaged, redraw, tiny, unet

graphs_module = sys.modules["epsrt_export.graphs"]
TINY = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 2}


def put(path, network=None, schedule=None, **more):
    return export_network(network or tiny(), schedule or Schedule(T=20), path, **{**TINY, **more})


@pytest.fixture
def no_export(monkeypatch):
    """Arguments are refused before torch.onnx is asked for anything."""

    def fail(*args, **kwargs):
        raise AssertionError("the export began")

    monkeypatch.setattr(graphs_module, "to_onnx", fail)


@pytest.fixture(scope="module")
def graphs(bundle_path, plain_bundle_path):
    return [p for path in (bundle_path, plain_bundle_path) for p in sorted(path.glob("*fp??.onnx"))]


class TestBundlesOfUNets:
    def test_rungs_of_both_precisions_are_stored(self, bundle_path):
        rungs = Bundle.open(bundle_path).parity()
        names = [(r.name, r.precision) for r in rungs if r.graph == ""]
        measured = ["network", "conditions", "step", "ddim-50", "ddpm-100", "batch", *AT_EXPORT]
        plans = [("schedule", "fp64"), ("plan ddim-50", "fp64"), ("plan ddpm-100", "fp64")]
        assert names == [*plans, *((n, p) for p in ("fp32", "fp16") for n in measured)]
        assert all(r.passed for r in rungs)

    def test_manifest_says_what_it_holds(self, bundle_path, checkpoint_path, network, schedule):
        m, loaded = Bundle.open(bundle_path).manifest, load_checkpoint(checkpoint_path)
        assert m.schedule == schedule
        assert (m.prediction, m.value_range, m.classes, m.null_label) == ("epsilon", (-1.0, 1.0), 10, 10)
        assert (m.shape, m.max_batch) == ((1, 8, 8), 8)
        assert m.provenance.source == checkpoint_path.name
        assert m.provenance.source_sha256 == loaded.sha256
        assert m.provenance.parameters == sum(p.numel() for p in network.parameters())
        assert m.provenance.network == "epsrt_trainer.unet.UNet"
        assert m.provenance.config["base_channels"] == 16
        assert {"epsrt", "torch", "onnx", "python"} <= set(m.provenance.versions)
        files = {"weights-fp32.bin", "weights-fp16.bin", GOLDEN, PARITY}
        kinds = ("fp32", "fp16", "guidance-fp32", "guidance-fp16")
        files |= {f"step-{kind}{dialect}.onnx" for kind in kinds for dialect in ("", ".tensorrt", ".cuda")}
        assert set(m.files) == files
        assert {*files, MANIFEST} == set(os.listdir(bundle_path))

    def test_graphs_are_valid_and_every_batch_is_symbolic(self, graphs):
        assert len(graphs) == 5
        for path in graphs:
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(path, load_external_data=False)
            labels = ["label", *(["label_null"] if "guidance" in path.name else [])] if "tiny" in str(path) else []
            assert [v.name for v in model.graph.input] == ["x", "m", "z", "rows", *labels]
            assert [v.name for v in model.graph.output] == ["x_next", "m_next", "x0"]
            for value in (*model.graph.input, *model.graph.output):
                first, *rest = value.type.tensor_type.shape.dim
                assert first.dim_param
                assert not first.dim_value
                assert all(d.dim_value for d in rest)
            assert [o.version for o in model.opset_import if o.domain == ""] == [21]

    def test_large_initializers_live_aligned_in_the_weights_file(self, graphs):
        for path in graphs:
            model = onnx.load(path, load_external_data=False)
            outside, end = externals(model), 0
            assert len(outside) > 20
            weights = path.with_name(f"weights-{path.stem[-4:]}.bin")
            size = os.path.getsize(weights)
            for tensor in model.graph.initializer:
                if tensor.name in outside:
                    place = outside[tensor.name]
                    assert place["location"] == weights.name
                    assert int(place["offset"]) % 4096 == 0
                    assert int(place["length"]) >= 1024
                    assert not tensor.raw_data
                    end = max(end, int(place["offset"]) + int(place["length"]))
                else:
                    assert tensor.ByteSize() < 1024 + 200
            assert end == size
            constants = [a.t for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.TENSOR]
            assert all(t.ByteSize() < 1024 for t in constants)
            assert path.stat().st_size < size

    def test_no_file_names_this_machine(self, bundle_path, plain_bundle_path):
        home, here = str(Path.home()), str(Path(__file__).parents[2])
        tokens = [
            here,
            sys.prefix,
            tempfile.gettempdir() + "/",
            "site-packages",
            "/lib/python",
            "stack_trace",
            "pkg.torch",
        ]
        if len(home) > 5:
            tokens.append(home)
        for path in (bundle_path, plain_bundle_path):
            for name, raw in tree(path).items():
                assert not [token for token in tokens if token.encode() in raw], name

    def test_fp16_weights_are_half_the_size(self, bundle_path):
        full, half = (os.path.getsize(bundle_path / f"weights-{p}.bin") for p in ("fp32", "fp16"))
        assert 0.4 < half / full < 0.75  # pages of 4 KiB hold small tensors too

    def test_unconditional_bundles_have_no_labels(self, plain_bundle_path):
        m = Bundle.open(plain_bundle_path).manifest
        assert (m.classes, m.null_label, m.class_names) == (0, None, ())
        assert m.provenance.source == "module"
        assert len(m.provenance.source_sha256) == 64


class TestPlainModules:
    def test_a_module_that_is_not_ours_exports_and_samples(self, small_bundle_path, schedule):
        assert Bundle.open(small_bundle_path).manifest.provenance.network == "nets.Tiny"
        x = torch.from_numpy(noise.normals(4, [0, 1, 2], noise.START, 0, 64).reshape(3, 1, 8, 8))
        network = tiny(seed=3)
        truth = ddim_loop(network, schedule, x, spaced(schedule.T, 10))
        with Sampler.open(small_bundle_path, "onnxruntime", threads=1) as sampler:
            np.testing.assert_allclose(sampler.sample(3, steps=10, seed=4), truth.numpy(), rtol=0, atol=3e-5)

    def test_v_prediction_at_zero_terminal_snr(self, tmp_path):
        schedule = Schedule(T=60, zero_snr=True)
        bundle = put(tmp_path / "v.epsrt", unet(seed=4), schedule, prediction="v", opset=22)
        m = Bundle.open(bundle.path).manifest
        assert (m.prediction, m.schedule) == ("v", schedule)
        model = onnx.load(bundle.path / "step-fp32.onnx", load_external_data=False)
        assert [o.version for o in model.opset_import if o.domain == ""] == [22]
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            assert sampler.plan(steps=10)["t"][0] == 59
            assert np.isfinite(sampler.sample(2, steps=10)).all()

    def test_x0_prediction_with_labels_another_shape_and_range_in_both_precisions(self, tmp_path):
        network = tiny(seed=5, channels=2, classes=4)
        bundle = put(
            tmp_path / "x0.epsrt",
            network,
            Schedule("cosine", 40),
            shape=(2, 8, 6),
            prediction="x0",
            classes=4,
            class_names=("a", "b", "c", "d"),
            value_range=(0.0, 2.0),
            precisions=("fp16", "fp32"),
            max_batch=3,
            config={"some": 1},
            training={"steps": 7},
        )
        m = bundle.manifest
        assert (m.shape, m.clip, m.null_label, m.class_names) == ((2, 8, 6), 2.0, None, ("a", "b", "c", "d"))
        assert (m.provenance.config, m.provenance.training) == ({"some": 1}, {"steps": 7})
        assert [g.precision for g in m.graphs] == ["fp16", "fp32"]
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            assert sampler.engine.precision == "fp32"
            assert (sampler.plan(steps=4)["clip"] == 2).all()
            assert sampler.sample(3, steps=4, labels=[0, 1, 3]).shape == (3, 2, 8, 6)
            with pytest.raises(InputError, match="needs labels, 0 … 3, and knows no null label"):
                sampler.sample(1, steps=4)

    def test_dear_networks_record_the_last_rows_of_ddpm(self, tmp_path, monkeypatch):
        monkeypatch.setattr(golden, "DEAR", 0)
        monkeypatch.setattr(golden, "CUT", ((2, 15, 1), (1, 5, 0)))
        path = put(tmp_path / "dear.epsrt").path
        bundle = Bundle.open(path)
        kept = bundle.golden()
        assert kept.trajectories["ddpm-20-last-15"].rows.shape[0] == 15
        assert kept.trajectories["ddpm-20-last-15"].init.shape == (2, 1, 8, 8)
        names = ["network", "step", "ddim-20", "ddpm-20-last-15", "batch", *AT_EXPORT]
        assert [r.name for r in bundle.parity()[3:]] == names
        with Sampler.open(path, "onnxruntime", threads=1) as sampler:
            assert all(rung.passed for rung in verify(sampler.engine))

    def test_the_module_is_left_as_it_was(self, tmp_path):
        network = tiny().train()
        before = {k: v.clone() for k, v in network.state_dict().items()}
        put(tmp_path / "some.epsrt", network, precisions=("fp32", "fp16"))
        assert network.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        for name, value in network.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])

    def test_dropout_is_off(self, tmp_path):
        class Dropping(Tiny):
            def forward(self, x, t):
                return super().forward(nn.functional.dropout(x, 0.5, self.training), t)

        put(tmp_path / "some.epsrt", redraw(Dropping()).train())

    def test_stages_are_told(self, tmp_path):
        told = []
        put(tmp_path / "some.epsrt", on_stage=lambda what, fraction: told.append((what, fraction)))
        stages = list(dict.fromkeys(what for what, _ in told))
        assert stages[:4] == ["graphs fp32", "ddim-20", "ddim-20 in float64", "ddpm-20"]
        rungs = "network", "step", "ddim-20", "ddpm-20", "batch", "dialects"
        assert stages[4:] == [f"parity fp32 {name}" for name in rungs]
        assert all(dict(told)[stage] == 1.0 for stage in stages)


EXPORT_TINY = """
import sys
sys.path.insert(0, sys.argv[2])
from nets import tiny
from epsrt import Schedule
from epsrt_export import export_network
print(export_network(tiny(), Schedule(T=20), sys.argv[1], shape=(1, 8, 8), max_batch=2).manifest.digest)
"""


class TestReproducible:
    def test_the_same_module_gives_the_same_bytes(self, tmp_path):
        made = put(tmp_path / "a.epsrt", precisions=("fp32", "fp16"))
        done = run_python(EXPORT_TINY, tmp_path / "b.epsrt", Path(__file__).parents[1], env={"PYTHONHASHSEED": "7"})
        assert done.returncode == 0, done.stderr
        assert tree(made.path) == tree(tmp_path / "b.epsrt")
        assert made.manifest.digest == done.stdout.split()[-1]

    def test_other_weights_give_another_digest(self, tmp_path, small_bundle_path, schedule):
        other = put(tmp_path / "a", tiny(4), schedule, max_batch=4)
        small = Bundle.open(small_bundle_path)
        assert other.manifest.digest != small.manifest.digest
        assert other.manifest.provenance.source_sha256 != small.manifest.provenance.source_sha256

    def test_a_checkpoint_by_path_and_loaded_are_the_same(self, checkpoint_path):
        a, b = families.load("epsrt", checkpoint_path), own.of(load_checkpoint(checkpoint_path))
        fields = {f.name for f in dataclasses.fields(a)} - {"network"}
        assert all(getattr(a, name) == getattr(b, name) for name in fields)
        assert (a.shape, a.classes, a.null_label, a.family) == ((1, 8, 8), 10, 10, "epsrt")
        for name, tensor in a.network.state_dict().items():
            assert torch.equal(tensor, b.network.state_dict()[name])

    def test_checkpoints_without_names_or_null_label(self, tmp_path):
        network = unet(classes=3, null_label=False)
        path = save_checkpoint(tmp_path / "a.safetensors", network, network.config, Schedule(), prediction="v")
        source = own.load(path)
        assert (source.null_label, tuple(source.class_names), source.prediction) == (None, (), "v")


class TestTheGate:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_one_damaged_weight_is_a_parity_error_and_no_bundle(self, tmp_path, monkeypatch, precision):
        monkeypatch.setattr(graphs_module, "to_onnx", damaged(graphs_module.to_onnx, "middle.weight", 0.3, precision))
        limit = {"fp32": "2e-06", "fp16": "0.001"}[precision]
        message = (
            rf"parity missed: network in {precision} on onnxruntime is \d\S+ relative L2 \(at most {limit} allowed\) "
            r"at t = \d+; no bundle was written"
        )
        with pytest.raises(ParityError, match=message):
            put(tmp_path / "some.epsrt", precisions=("fp32", "fp16"))
        assert os.listdir(tmp_path) == []

    def test_the_old_bundle_survives(self, tmp_path, monkeypatch, small_bundle_path):
        out = shutil.copytree(small_bundle_path, tmp_path / "some.epsrt")
        monkeypatch.setattr(graphs_module, "to_onnx", damaged(graphs_module.to_onnx, "middle.weight", 0.3))
        with pytest.raises(ParityError):
            put(out)
        assert tree(out) == tree(small_bundle_path)
        assert os.listdir(tmp_path) == ["some.epsrt"]

    def test_a_trajectory_miss_names_the_image(self, tmp_path, monkeypatch):
        """The network is right and the rows are not: rung 3 passes, rung 4 does not."""
        record = golden.record

        def later(*args):
            kept = record(*args)
            x = kept.trajectories["ddim-20"].x.copy()
            x[2] += np.float32(0.001)
            run = dataclasses.replace(kept.trajectories["ddim-20"], x=x)
            return dataclasses.replace(kept, trajectories={**kept.trajectories, "ddim-20": run})

        monkeypatch.setattr(golden, "record", later)
        with pytest.raises(ParityError, match=r"ddim-20 in fp32 on onnxruntime is 66 dB \(at least 100 .* at image 2"):
            put(tmp_path / "some.epsrt")
        assert os.listdir(tmp_path) == []

    def test_a_wrong_plan_is_found_before_anything_is_written(self, tmp_path, monkeypatch, no_export):
        make = parity_module.solvers.make
        monkeypatch.setattr(parity_module.solvers, "make", lambda *a, **k: make(*a, **{**k, "clip": 0.99}))
        with pytest.raises(
            ParityError, match=r"plan ddim-20 in fp64 on numpy is .* max \|Δ\| \(at most 1e-09 allowed\)"
        ):
            put(tmp_path / "some.epsrt")
        assert os.listdir(tmp_path) == []

    def test_a_wrong_schedule_is_found(self, tmp_path, monkeypatch, no_export):
        schedule = Schedule(T=20)
        wrong = schedule.alpha_bar.copy()
        wrong[7] += 1e-11
        monkeypatch.setitem(vars(schedule), "alpha_bar", wrong)
        with pytest.raises(ParityError, match=r"schedule in fp64 on numpy is 1e-11 .* at t = 7"):
            put(tmp_path / "some.epsrt", schedule=schedule)

    @pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine", 300), Schedule("sigmoid", zero_snr=True)])
    def test_good_schedules_pass(self, schedule):
        rung = parity_module.schedule_rung(schedule)
        assert rung.passed
        assert rung.figure < 1e-13


class TestNothingIsLeft:
    def test_after_an_interrupt(self, tmp_path):
        def interrupt(what, fraction):
            if what == "ddpm-20" and fraction > 0.4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            put(tmp_path / "some.epsrt", on_stage=interrupt)
        assert os.listdir(tmp_path) == []

    def test_after_an_interrupt_over_an_old_bundle(self, tmp_path, small_bundle_path):
        def interrupt(what, fraction):
            if what.startswith("parity"):
                raise KeyboardInterrupt

        out = shutil.copytree(small_bundle_path, tmp_path / "some.epsrt")
        with pytest.raises(KeyboardInterrupt):
            put(out, on_stage=interrupt)
        assert tree(out) == tree(small_bundle_path)
        assert os.listdir(tmp_path) == ["some.epsrt"]

    def test_when_the_disk_is_full(self, tmp_path):
        code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from nets import tiny
from epsrt import Schedule
from epsrt_export import export_network
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # the graph fits, its weights do not
try:
    export_network(tiny(), Schedule(T=20), sys.argv[1], shape=(1, 8, 8), precisions=("fp32",), max_batch=2)
except OSError as error:
    print("OSError", error)
"""
        done = run_python(code, tmp_path / "some.epsrt")
        assert done.stdout.startswith("OSError"), done.stderr
        assert os.listdir(tmp_path) == []

    def test_a_good_export_replaces_the_old_bundle(self, tmp_path, small_bundle_path):
        """Its signature and engine files, which were of it alone, too."""
        out = shutil.copytree(small_bundle_path, tmp_path / "some.epsrt")
        (out / SIGNATURE).write_text("of the old one")
        (out / "engines").mkdir()
        made = put(out)
        assert not (out / SIGNATURE).exists()
        assert not (out / "engines").exists()
        assert made.manifest.digest != Bundle.open(small_bundle_path).manifest.digest
        assert Bundle.open(out) == made
        assert os.listdir(tmp_path) == ["some.epsrt"]

    @pytest.mark.parametrize("what", ["directory", "file", "empty"])
    def test_what_is_no_bundle_is_refused_and_untouched(self, tmp_path, no_export, what):
        out = tmp_path / "some"
        if what == "file":
            out.write_bytes(b"mine")
        else:
            out.mkdir()
            if what == "directory":
                (out / "mine").write_bytes(b"mine")
        with pytest.raises(EpsrtError, match="some exists and is not a bundle: choose another name, or remove it"):
            put(out)
        kept = {"file": b"mine", "directory": {"mine": b"mine"}, "empty": {}}
        assert (out.read_bytes() if what == "file" else tree(out)) == kept[what]
        assert os.listdir(tmp_path) == ["some"]


class InPlace(Tiny):
    def forward(self, x, t):
        return super().forward(x.mul_(0.9), t)


class Returns(Tiny):
    """Tiny, with what it returns changed."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x, t):
        return self.change(super().forward(x, t))


class Frozen(Tiny):
    def forward(self, x, t):
        twice = super().forward(torch.cat([x, -x]), torch.cat([t, t]))
        a, b = twice.chunk(2)  # as guidance is often written
        return a - b


class FrozenByInt(Tiny):
    def forward(self, x, t):
        return super().forward(x, t).reshape(int(x.shape[0]), 1, 8, 8) * 1.0 + torch.zeros(int(x.shape[0]), 1, 8, 8)


class Branches(Tiny):
    def forward(self, x, t):
        out = super().forward(x, t)
        return out if x.sum() > 0 else -out


class Asserts(Tiny):
    def forward(self, x, t, y=None):
        assert y is not None, "a label is needed"
        return super().forward(x, t)


class WantsFields(Tiny):
    def forward(self, x, t):
        return super().forward(x.sample, t)


class TestNetworksThatDoNotFit:
    @pytest.mark.parametrize(
        ("network", "message"),
        [
            (Returns(lambda out: out[:, :, 1:]), r"Returns returns \[2, 1, 7, 8\] for an input of \[2, 1, 8, 8\]"),
            (Returns(lambda out: torch.cat([out, out], 1)), r"Returns returns \[2, 2, 8, 8\]"),
            (Returns(lambda out: (out,)), "Returns returns a tuple, not one tensor: wrap it"),
            (Returns(lambda out: {"sample": out}), "Returns returns a dict, not one tensor"),
            (Returns(lambda out: None), "Returns returns a NoneType, not one tensor"),
            (Returns(lambda out: out.double()), r"Returns returns torch.float64 for torch.float32: let its last line"),
            (Returns(lambda out: out + torch.rand(())), "Returns returns another tensor each time: switch its dropout"),
            (InPlace(), "InPlace changes its inputs in place: let it work on a copy"),
            (Asserts(), r"Asserts cannot run forward\(x, t\) .*a label is needed"),
            (WantsFields(), r"WantsFields cannot run forward\(x, t\) .*sample"),
            (tiny(channels=3), r"Tiny takes images of 3 channels, not 1: give shape = \(3, 8, 8\)"),
            (tiny(classes=3), r"Tiny cannot run forward\(x, t\)"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
    )
    def test_what_it_returns_or_takes_is_named(self, tmp_path, no_export, network, message):
        with pytest.raises(EpsrtError, match=message):
            put(tmp_path / "some.epsrt", network)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("kind", [Frozen, FrozenByInt, Branches])
    def test_what_cannot_be_a_graph_of_any_batch_is_named(self, tmp_path, kind):
        with pytest.raises(EpsrtError, match=f"torch cannot export {kind.__name__}: |was frozen to 3: ") as caught:
            put(tmp_path / "some.epsrt", redraw(kind()))
        assert not isinstance(caught.value, ParityError)
        assert "\n" not in str(caught.value)
        if kind is Branches:  # the line that torch.export stumbled over
            where = r"data-dependent .*; in test_export_network.py, line \d+, forward: return out if x.sum"
            assert re.search(where, str(caught.value))
        assert os.listdir(tmp_path) == []

    def test_an_unused_timestep_is_fine_or_named(self, tmp_path):
        class Timeless(Tiny):
            def forward(self, x, t):
                return super().forward(x, torch.zeros_like(t))

        assert put(tmp_path / "some.epsrt", redraw(Timeless())).manifest.graphs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8, 8)}, r"and shape = \[8, 8\] has 2 numbers: give 3, its channels first"),
        ({"shape": (1, 0, 8)}, r"shape = \[1, 0, 8\] is not C and one to three extents"),
        ({"prediction": "noise"}, "prediction 'noise' is unknown: use one of epsilon, x0, v"),
        ({"schedule": Schedule(T=20, zero_snr=True)}, "ε-prediction says nothing of x0 at t = 19, where ᾱ = 0"),
        ({"value_range": (1.0, -1.0)}, r"value_range = \[1.0, -1.0\] does not ascend"),
        ({"value_range": (0.0, float("nan"))}, "does not ascend"),
        ({"max_batch": 0}, "max_batch = 0 is outside 1 … 65536"),
        ({"max_batch": 65537}, "max_batch = 65537 is outside"),
        ({"precisions": ()}, r"precisions = \[\]: choose from fp32, fp16, int8, each once"),
        ({"precisions": ("int4",)}, r"precisions = \['int4'\]: choose from"),
        ({"precisions": ("fp32", "fp32")}, r"precisions = \['fp32', 'fp32'\]"),
        ({"precisions": "fp32"}, "precisions = .*choose from fp32, fp16"),
        ({"class_names": ("a",)}, "1 class names for 0 classes"),
        ({"classes": 3, "class_names": ("a",)}, "1 class names for 3 classes"),
        ({"classes": -1}, "classes = -1"),
        ({"null_label": 0}, r"null_label = 0 is outside 0 … 0 \(or the network has no classes\)"),
        ({"classes": 3, "null_label": 4}, "null_label = 4 is outside 0 … 3"),
        ({"classes": 3, "null_label": -1}, "null_label = -1 is outside 0 … 3"),
    ],
)
def test_bad_arguments_are_named(tmp_path, no_export, arguments, message):
    with pytest.raises(EpsrtError, match=message):
        put(tmp_path / "some.epsrt", **arguments)
    assert os.listdir(tmp_path) == []


def test_other_opsets_are_refused(tmp_path):
    for opset in (20, 23):
        with pytest.raises(EpsrtError, match=f"opset {opset} is not supported: use 21 or 22"):
            put(tmp_path / "some.epsrt", opset=opset)
    assert os.listdir(tmp_path) == []


def test_checkpoints_that_are_none_are_refused(tmp_path):
    with pytest.raises(BundleError, match="nowhere.safetensors"):
        export_function(tmp_path / "nowhere.safetensors", tmp_path / "some.epsrt")
    assert os.listdir(tmp_path) == []
