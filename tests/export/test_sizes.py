"""Dynamic height and width: graphs that hold at every size, their parity, and networks that are refused."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from epsrt import Bundle, BundleError, EpsrtError, Sampler, Schedule, noise, open_engine
from epsrt.manifest import GOLDEN, Sizes
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt.plan import STEP_COLUMNS
from epsrt.timesteps import spaced
from epsrt.verify import verify
from epsrt_export import export_network
from epsrt_export.golden import _other_sizes
from epsrt_export.onnx_graph import to_onnx
from epsrt_export.sizes import example
from epsrt_export.stepgraph import StepModule
from epsrt_trainer.sample import ddim_loop
from helpers import forge, weights
from nets import Tiny, redraw, tiny, unet

STEPS = 10


@pytest.fixture(scope="module")
def sized(network: nn.Module, schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle_path`'s U-Net with sizes, multiples of 2 up to 24, and without its null label, so unguided."""
    options = {"shape": (1, 8, 8), "classes": 10, "max_batch": 8, "sizes": (2, 24)}
    return export_network(network, schedule, tmp_path_factory.mktemp("sized") / "sized.epsrt", **options).path


@pytest.fixture(scope="module")
def sampler(sized: Path):
    with Sampler.open(sized, "onnxruntime", threads=1) as opened:
        yield opened


class TestABundle:
    def test_says_its_sizes_and_proves_two(self, sized):
        bundle = Bundle.open(sized)
        assert bundle.manifest.sizes == Sizes(2, 24)
        assert bundle.manifest.shape == (1, 8, 8)
        rungs = [r for r in bundle.parity() if r.name == "sizes"]
        assert [(r.graph, r.precision, r.unit, r.limit) for r in rungs] == [
            ("", precision, "relative L2", limit) for precision, limit in (("fp32", 2e-6), ("fp16", 1e-3))
        ]
        assert all(0 < r.figure <= r.limit and r.where in ("4 × 4", "10 × 12") for r in rungs)
        golden = bundle.golden()
        assert golden.sizes[4, 4].x.shape == (5, 1, 4, 4)
        assert golden.sizes[10, 12].out.shape == (5, 1, 10, 12)
        np.testing.assert_array_equal(golden.sizes[10, 12].t, golden.network.t[::6])

    def test_its_graphs_are_free_in_batch_height_and_width_alone(self, sized, sized_bundle_path):
        for path in (sized / "step-fp32.onnx", sized / "step-fp16.onnx", sized_bundle_path / "step-fp32.onnx"):
            graph = onnx.load(path, load_external_data=False).graph
            shapes = {
                v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
                for v in (*graph.input, *graph.output)
            }
            assert shapes == {
                **{n: ["batch", 1, "height", "width"] for n in ("x", "m", "z", "x_next", "m_next", "x0")},
                "rows": ["batch", len(STEP_COLUMNS)],
                **({"label": ["batch"]} if "label" in shapes else {}),
            }

    def test_fixed_graphs_keep_no_shape_arithmetic(self, sized, tmp_path):
        """What the CUDA provider would run on the CPU, and no CUDA graph could hold."""
        options = ort.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "fixed.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        for name, extent in (("batch", 2), ("height", 10), ("width", 16)):
            options.add_free_dimension_override_by_name(name, extent)
        ort.InferenceSession(sized / "step-fp16.onnx", options, providers=["CPUExecutionProvider"])
        kinds = {n.op_type for n in onnx.load(tmp_path / "fixed.onnx", load_external_data=False).graph.node}
        assert "Conv" in kinds
        assert not kinds & {"Shape", "Size", "Range"}

    def test_its_own_size_is_as_without_sizes(self, sampler, bundle_path):
        options = {"steps": STEPS, "seed": 5, "labels": [0, 3, 9], "rederive": False}
        with Sampler.open(bundle_path, "onnxruntime", threads=1) as plain:
            want = plain.sample(**options)
        np.testing.assert_allclose(sampler.sample(**options), want, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(sampler.sample(size=(8, 8), **options), sampler.sample(**options))

    @pytest.mark.parametrize("size", [(16, 12), (2, 24)])
    def test_samples_of_other_sizes_are_pytorchs(self, sampler, network, schedule, size):
        labels, ts = [3, 5], spaced(schedule, STEPS, "trailing")
        x = noise.normals(7, np.arange(2), noise.START, 0, size[0] * size[1]).reshape(2, 1, *size)
        with torch.no_grad():
            truth = ddim_loop(lambda x, t: network(x, t, torch.tensor(labels)), schedule, torch.from_numpy(x), ts)
        mine = sampler.sample(steps=STEPS, seed=7, labels=labels, size=size, rederive=False)
        assert mine.shape == (2, 1, *size)
        assert worst_psnr(mine, truth.numpy(), (-1.0, 1.0)) > 100
        assert mine.std() > 0.2

    def test_half_precision_is_near_at_every_size_and_batch(self, sized, sampler):
        with Sampler.open(sized, "onnxruntime", precision="fp16", threads=1) as half:
            for batch, size in ((1, (24, 24)), (3, (6, 20)), (8, (2, 2))):
                options = {"n": batch, "steps": 3, "seed": 2, "labels": 4, "size": size}
                assert 0 < relative_l2(half.sample(**options), sampler.sample(**options)) < 5e-3


class TestTheRung:
    def rungs(self, path):
        engine = open_engine(Bundle.open(path), "onnxruntime", precision="fp32", threads=1)
        return {rung.name: rung for rung in verify(engine)}

    def test_a_damaged_weight_is_found(self, copy_of, sized_bundle_path):
        path = copy_of(sized_bundle_path)
        weights(path, "middle.weight")[0, 0, 1, 1] += 0.05
        forge(path)
        assert not self.rungs(path)["sizes"].passed

    def test_a_damaged_record_is_found_where_it_is(self, copy_of, sized_bundle_path):
        from safetensors.numpy import load_file, save_file

        path = copy_of(sized_bundle_path)
        golden = load_file(path / GOLDEN)
        assert {key.split(".")[1] for key in golden if key.startswith("size.")} == {"12x16"}
        golden["size.12x16.out"][2] *= 1.0001
        save_file(golden, path / GOLDEN)
        forge(path)
        rungs = self.rungs(path)
        assert [name for name, rung in rungs.items() if not rung.passed] == ["sizes"]
        assert rungs["sizes"].where == "12 × 16"

    def test_missing_records_are_refused(self, copy_of, sized_bundle_path):
        from safetensors.numpy import load_file, save_file

        path = copy_of(sized_bundle_path)
        golden = load_file(path / GOLDEN)
        for gone, lacks in (("size.12x16.out", "size.12x16.out"), ("size.", "other sizes")):
            golden = {key: value for key, value in golden.items() if not key.startswith(gone)}
            save_file(golden, path / GOLDEN)
            forge(path)
            with pytest.raises(BundleError, match=f"the golden file lacks {lacks}: export again"):
                self.rungs(path)

    @pytest.mark.parametrize(
        ("shape", "sizes", "want"),
        [
            ((1, 8, 8), Sizes(2, 24), [(4, 4), (10, 12)]),
            ((1, 8, 8), Sizes(4, 8), [(4, 8)]),
            ((1, 8, 8), Sizes(8, 16), [(16, 16), (16, 8)]),
            ((4, 64, 64), Sizes(8, 128), [(32, 32), (72, 80)]),
            ((4, 64, 48), Sizes(8, 64), [(32, 24), (56, 64)]),
        ],
    )
    def test_its_sizes_are_the_half_and_one_that_is_not_square(self, shape, sizes, want):
        assert _other_sizes(shape, sizes) == want


class Bent(Tiny):
    """Tiny behind a function of its input."""

    def forward(self, x, t):
        return super().forward(self.bend(x), t)


class Positioned(Bent):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1, 8, 8))

    def bend(self, x):
        return x + self.position


class Branches(Bent):
    def bend(self, x):
        return x if x.shape[2] % 4 == 0 else 2 * x


class Limited(Bent):
    def bend(self, x):
        return x if x.shape[3] <= 16 else 2 * x


class Counts(Bent):
    def bend(self, x):
        return x + torch.linspace(0, 1, int(x.shape[3])).view(1, 1, 1, -1) + np.float32(x.shape[2])


def put(network, out, **options):
    options = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 2, "sizes": (2, 24), **options}
    return export_network(network, Schedule(T=20, beta_start=1e-3, beta_end=0.2), out, **options)


class TestRefused:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((0, 24), r"sizes = \(0, 24\): give a multiple of at least 1"),
            ((8, 1 << 17), r"sizes = \(8, 131072\): give .* a largest of at most 65536 pixels"),
            ((8, 60), r"sizes = \(8, 60\): 60 is no multiple of 8: give 56 or 64"),
            ((8, 8), r"sizes = \(8, 8\) are one size alone: raise the largest, or leave sizes out"),
            ((3, 24), r"sizes = \(3, 24\) do not hold the network's own 8 × 8: give a multiple that divides both"),
            ((2, 4), r"sizes = \(2, 4\) do not hold the network's own 8 × 8"),
        ],
    )
    def test_numbers_that_do_not_fit(self, tmp_path, sizes, message):
        with pytest.raises(EpsrtError, match=message):
            put(tiny(), tmp_path / "some.epsrt", sizes=sizes)
        assert os.listdir(tmp_path) == []

    def test_dynamic_thresholding(self, tmp_path):
        with pytest.raises(EpsrtError, match="sizes and thresholding exclude each other: .*: leave one of them out"):
            put(tiny(), tmp_path / "some.epsrt", thresholding=(0.9, 1.5))

    def test_position_embeddings(self, tmp_path):
        message = (
            r"Positioned fixes its height and width at 8 × 8, as position embeddings do: leave sizes out \(Positioned "
            r"cannot run forward\(x, t\) on x \[2, 1, 2, 6\].*\)$"
        )
        with pytest.raises(EpsrtError, match=message):
            put(redraw(Positioned()), tmp_path / "some.epsrt")
        assert os.listdir(tmp_path) == []

    def test_a_multiple_below_the_stride(self, tmp_path):
        message = r"UNet does not take multiples of 1 pixels, but of 2: give that for the multiple of sizes \(UNet"
        with pytest.raises(EpsrtError, match=message):
            put(unet(), tmp_path / "some.epsrt", sizes=(1, 24))

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (
                Branches,
                r"Branches takes another path at 6 × 4 pixels than at 8 × 10, where \(height % 4\) == 0: give 4 for "
                "the multiple, or leave sizes out",
            ),
            (Limited, r"Limited takes another path at 4 × 18 pixels than at 8 × 10, where width .*: leave sizes out"),
            (Counts, "Counts fixes its height or width, often by a Python int of x.shape: leave sizes out"),
        ],
    )
    def test_what_torch_would_freeze_without_a_word(self, tmp_path, kind, message):
        with pytest.raises(EpsrtError, match=message):
            put(redraw(kind()), tmp_path / "some.epsrt")
        assert os.listdir(tmp_path) == []

    def test_what_they_suggest_exports(self):
        """Where its multiple is 4, Branches has one path."""
        step = StepModule(redraw(Branches()), STEP_COLUMNS, (), torch.float32)
        model = to_onnx(step, (1, 8, 8), sizes=Sizes(4, 24))
        assert model.graph.input[0].type.tensor_type.shape.dim[3].dim_param == "width"


@pytest.mark.parametrize(
    ("shape", "sizes", "want"),
    [
        ((1, 8, 8), Sizes(2, 24), (8, 10)),
        ((1, 8, 8), Sizes(8, 24), (16, 24)),
        ((1, 8, 8), Sizes(8, 16), (16, 24)),  # of two sizes, one is a multiple itself: a larger must do
        ((1, 24, 8), Sizes(4, 24), (24, 8)),
        ((1, 1, 1), Sizes(1, 2), (2, 3)),
    ],
)
def test_examples_are_none_that_torch_takes_for_constants(shape, sizes, want):
    assert example(shape, sizes) == want
