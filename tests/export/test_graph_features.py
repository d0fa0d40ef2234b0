"""Step graphs with guidance, a classifier and a mask: written, shared, gated."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import onnx
import pytest
import torch

from epsrt import Bundle, EpsrtError, Schedule, open_engine
from epsrt.parity.measure import LIMITS
from epsrt.plan import idle_row
from epsrt.verify import verify, verify_all
from epsrt_export import NoisedClassifier, ParityError, Source, export, graphs
from epsrt_export.stepgraph import StepModule
from helpers import AT_EXPORT, DIALECTS, T, externals, forge
from nets import judge, labels, tiny

SCHEDULE = Schedule(T=T, beta_start=1e-3, beta_end=0.2)
KINDS = ["", "guidance", "classifier", "mask", "guidance-mask", "classifier-mask"]


@pytest.fixture(scope="module")
def edited(edited_bundle_path) -> Bundle:
    return Bundle.open(edited_bundle_path)


def source(**more) -> Source:
    return Source(tiny(seed=4, classes=3), SCHEDULE, (1, 8, 8), classes=3, **more)


class TestBundle:
    def test_it_lists_every_kind_in_each_precision(self, edited):
        for precision in ("fp32", "fp16"):
            have = [graph for graph in edited.manifest.graphs if graph.precision == precision]
            assert [graph.stem for graph in have] == KINDS
            assert [graph.file for graph in have][1] == f"step-guidance-{precision}.onnx"
            assert {graph.weights for graph in have} == {f"weights-{precision}.bin"}

    def test_the_classifier_is_described(self, edited):
        told = edited.manifest.classifier
        assert (told.classes, told.network, told.source) == (10, "nets.Judge", "judge")
        assert told.parameters == sum(p.numel() for p in judge(seed=6).parameters())
        assert len(told.source_sha256) == 64

    def test_graphs_share_their_weights(self, edited):
        """The network's are stored once, whichever graph reads them; only the classifier's own are more."""
        places = {}
        for graph in edited.manifest.graphs:
            model = onnx.load(edited.path / graph.file, load_external_data=False)
            places[graph.precision, graph.stem] = {entry["offset"] for entry in externals(model).values()}
        for precision in ("fp32", "fp16"):
            plain = places[precision, ""]
            assert plain == places[precision, "mask"] == places[precision, "guidance"]
            assert plain < places[precision, "classifier"]
        size = (edited.path / "weights-fp32.bin").stat().st_size
        network, guide = (sum(p.numel() for p in m.parameters()) for m in (edited_network(edited), judge(seed=6)))
        assert size < 4 * (network + guide) + 4096 * 120

    def test_guided_graphs_are_written_where_there_is_a_null_label_alone(self, bundle_path, plain_bundle_path):
        assert [g.stem for g in Bundle.open(bundle_path).manifest.graphs] == ["", "guidance"] * 2
        assert [g.stem for g in Bundle.open(plain_bundle_path).manifest.graphs] == [""]


def edited_network(bundle: Bundle) -> torch.nn.Module:
    from epsrt_trainer.unet import UNet, UNetConfig
    from nets import unet_config

    return UNet(unet_config(UNetConfig, 1, 10))


class TestGate:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_every_graph_has_its_rungs(self, edited, precision):
        step, psnr = LIMITS["cpu", precision]
        rungs = [r for r in edited.parity() if r.precision == precision]
        by_graph = {kind: {r.name: r for r in rungs if r.graph == kind} for kind in KINDS}
        common = {"network", "conditions", "step", "batch", *DIALECTS}
        assert set(by_graph[""]) == common | {"ddim-50", "ddpm-100", "optimisation"}
        assert set(by_graph["guidance"]) == common | {"guidance", "guided-ddim-50", "optimisation"}
        assert set(by_graph["classifier"]) == common | {"classifier", "optimisation"}
        assert set(by_graph["guidance-mask"]) == common | {"guidance", "mask"}
        guided = by_graph["guidance"]["guided-ddim-50"]
        assert guided.limit == pytest.approx(psnr - 20 * np.log10(3), abs=0.05)  # w = 2 magnifies errors threefold
        assert by_graph["guidance"]["guidance"].limit == by_graph["mask"]["mask"].limit == step
        assert by_graph["classifier"]["classifier"].limit == 1e-4
        assert all(r.figure > 0 for r in rungs if r.name in ("guidance", "classifier", "guided-ddim-50"))
        assert all(r.passed for r in rungs)

    def test_any_machine_can_prove_them_again(self, edited):
        engine = open_engine(edited, "onnxruntime", threads=1)
        stored = {(r.graph, r.name): r.figure for r in edited.parity() if r.precision == "fp32"}
        again = {(r.graph, r.name): r.figure for r in verify_all(engine)}
        elsewhere = "schedule", "plan ddim", "plan ddpm", *AT_EXPORT
        assert again.keys() == {key for key in stored if key[1] not in elsewhere}
        assert again["classifier", "classifier"] == pytest.approx(stored["classifier", "classifier"], rel=0.5)

    @pytest.mark.parametrize(
        ("features", "damage", "rung"),
        [
            (("guidance",), {"w": 1.01}, "guidance"),
            (("guidance",), {"phi": 0.97}, "guidance"),
            (("classifier",), {"s": 1.001}, "classifier"),
            (("mask",), {"ka": 1.001}, "mask"),
            (("mask",), {"kb": 0.999}, "mask"),
        ],
    )
    def test_a_column_that_is_a_little_off_is_seen(self, edited, features, damage, rung):
        """A graph that multiplies one of its columns: as if the exported arithmetic were wrong."""
        engine = open_engine(edited, "onnxruntime", features=features, threads=1)
        good = {r.name: r for r in verify(engine)}
        assert good[rung].passed
        make = engine.lanes

        def lanes(*given):
            made = make(*given)
            advance = made.advance

            def wrong(rows):
                rows = np.array(rows)
                for name, factor in damage.items():
                    rows[..., engine.columns.index(name)] *= factor
                advance(rows)

            made.advance = wrong
            return made

        engine.lanes = lanes
        bad = {r.name: r for r in verify(engine)}
        assert not bad[rung].passed
        assert bad["network"].passed or "w" in damage  # which is 1 there, so that the network shows alone

    @pytest.mark.parametrize("part", ["null_label", "gradient"])
    def test_an_export_that_misses_writes_nothing(self, tmp_path, monkeypatch, part):
        """The graph compares with another label than the golden file; or has another classifier's gradient."""
        real = graphs.StepModule

        def wrong(network, columns, takes, dtype, threshold, gradient):
            step = real(network, columns, takes, dtype, threshold, gradient)
            if part == "null_label":
                step._predict = partial(other, step._predict)
            elif gradient is not None:
                step.gradient = copy.deepcopy(gradient)
                with torch.no_grad():
                    next(step.gradient.parameters()).mul_(1.05)
            return step

        def other(predict, x, t, given, k):
            more = {"label_null": 0 * given["label_null"]} if "w" in k else {}
            return predict(x, t, given | more, k)

        monkeypatch.setattr(graphs, "StepModule", wrong)
        more = {"null_label": 2} if part == "null_label" else {}
        guide = None if part == "null_label" else NoisedClassifier(judge(classes=3), 3)
        with pytest.raises(ParityError, match=r"parity missed: (guidance|classifier) of the \1 graph in fp32"):
            export(source(**more), tmp_path / "some.epsrt", precisions=("fp32",), classifier=guide)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["guidance.null", "classifier.gradient"])
    def test_a_golden_file_without_its_arrays_is_a_bundle_error(self, edited_bundle_path, copy_of, name):
        from safetensors.numpy import load_file, save_file

        from epsrt import BundleError

        path = copy_of(edited_bundle_path)
        kept = load_file(path / "golden.safetensors")
        del kept[name]
        save_file(kept, path / "golden.safetensors")
        forge(path)
        engine = open_engine(Bundle.open(path), "onnxruntime", features=[name.split(".")[0]], threads=1)
        with pytest.raises(BundleError, match=f"the golden file lacks {name}: export again"):
            verify(engine)


class TestStepGraph:
    def rows(self, columns, **values):
        row = idle_row(columns)
        for name, value in values.items():
            row[columns.index(name)] = value
        return torch.from_numpy(np.tile(row, (2, 1)))

    def test_a_learned_variance_is_the_labels_not_the_null_labels(self):
        """Of 2C channels, guidance mixes the first C; v is c's, as diffusers' DiTPipeline has it."""
        from epsrt.manifest import step_columns
        from nets import learned

        network = learned(seed=3, classes=4)
        columns = step_columns("learned_range", ["guidance"])
        step = StepModule(network, columns, labels(3), torch.float32)
        x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
        rows = self.rows(columns, a=0.0, h=1.0, d=1.0, r=1.0, w=3.0, t=7.0)
        z = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            mine = step(x, torch.zeros_like(x), z, rows, {"label": label, "label_null": torch.full_like(label, 3)})[0]
            c = network(x, torch.full((2,), 7.0), label)
            u = network(x, torch.full((2,), 7.0), torch.tensor([3, 3]))
        truth = u[:, :1] + 3 * (c - u)[:, :1] + torch.exp(c[:, 1:]) * z
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)

    def test_rescale_is_the_papers(self):
        """arXiv 2305.08891, eq. 15 and 16."""
        from epsrt.manifest import step_columns

        network, columns = tiny(seed=4, classes=3), step_columns(None, ["guidance"])
        step = StepModule(network, columns, labels(2), torch.float32)
        x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
        with torch.no_grad():
            rows = self.rows(columns, a=0.0, h=1.0, w=5.0, phi=0.7, t=7.0)
            given = {"label": label, "label_null": torch.full_like(label, 2)}
            mine = step(x, torch.zeros_like(x), torch.zeros_like(x), rows, given)[0]
            c, u = (network(x, torch.full((2,), 7.0), each) for each in (label, torch.tensor([2, 2])))
            guided = u + 5.0 * (c - u)
            pulled = guided * c.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        torch.testing.assert_close(mine, 0.7 * pulled + 0.3 * guided, rtol=1e-5, atol=1e-6)

    def test_a_rescale_of_nothing_is_finite(self):
        """Where the guided output is constant, its deviation is 0."""
        from epsrt.manifest import step_columns

        class Flat(torch.nn.Module):
            def forward(self, x, t, label):
                return 0 * x + label[:, None, None, None]

        columns = step_columns(None, ["guidance"])
        step = StepModule(Flat(), columns, labels(0), torch.float32)
        x = torch.randn(2, 1, 8, 8)
        rows = self.rows(columns, a=0.0, h=1.0, w=2.0, phi=0.7)
        given = {"label": torch.tensor([1, 2]), "label_null": torch.zeros(2, dtype=torch.int64)}
        assert torch.isfinite(step(x, x, x, rows, given)[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifier": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ({"classifier": NoisedClassifier(judge(classes=3), 4)}, r"\[.*3\].*4|4.*3"),
        ({"classifier": NoisedClassifier(judge(classes=3), 3), "sizes": (4, 16)}, "sizes and a classifier exclude"),
        (
            {"classifier": NoisedClassifier(judge(classes=3), 3, shape=(1, 16, 16))},
            "the classifier module takes 1×16×16, the network 1×8×8: train it on the same",
        ),
        (
            {"classifier": NoisedClassifier(judge(classes=3), 3, schedule=Schedule())},
            r"the classifier module was trained on another noise schedule \(linear, T = 1000\) than the network",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(EpsrtError, match=message):
        export(source(), tmp_path / "some.epsrt", precisions=("fp32",), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x, t: x, 3), "the classifier is a function, not a Module: give one"),
        ((judge(), 1), "classes = 1: a classifier tells at least 2 apart"),
        ((judge(), 10, ("a", "b")), "2 class names for 10 classes: give one each, or none"),
    ],
)
def test_classifiers_that_are_none(arguments, message):
    with pytest.raises(EpsrtError, match=message):
        NoisedClassifier(*arguments)


def test_masks_of_free_sizes(tmp_path):
    """Outpainting: what is known lies on a larger canvas, and comes back exactly."""
    from epsrt import Sampler, canvas

    made = Source(tiny(seed=3), SCHEDULE, (1, 8, 8))
    path = export(made, tmp_path / "canvas.epsrt", precisions=("fp32",), sizes=(4, 24), masked=True, max_batch=4).path
    with Sampler.open(path, "onnxruntime", threads=1) as sampler:
        images = sampler.sample(2, steps=5)
        known, mask = canvas(images, (12, 20), at=(4, 0))
        wide = sampler.sample(known=known, mask=mask, steps=5, seed=1, method="ddpm")
        assert wide.shape == (2, 1, 12, 20)
        np.testing.assert_array_equal(wide[:, :, 4:, :8], images)
        assert np.abs(wide[:, :, :4]).max() > 0.05
        known, mask = canvas(images, (10, 20))
        with pytest.raises(
            EpsrtError, match="a size of 10 × 20 is none of canvas.epsrt: height and width are multiples"
        ):
            sampler.sample(known=known, mask=mask, steps=5)
