"""Every exported step graph is parsed and built by the real TensorRT-RTX, for GPUs that need not be here."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import msgspec
import pytest

import unets
from epsrt import Bundle
from epsrt.engines.gpu.trt_build import BuildOptions, build, describe
from epsrt.engines.gpu.trt_library import library
from epsrt.errors import EngineError
from epsrt.manifest import FORMAT, Sizes, StepGraph
from epsrt_command import tensors as layers
from nets import autoencoder, diffusers_unet, labels, redraw, tiny, unet

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx_cu13")

edited_bundle_path = unets.edited_bundle_path  # with attention
DIALECT = "tensorrt"
TARGETS = ("sm_86", "sm_89", "sm_120")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, small_bundle_path) -> Bundle:
    """A preset's plain step graph, FP32 and FP16, of 35.7 M fresh weights: what a builder sees of a real bundle."""
    from epsrt_export.graphs import Recipe, write_graphs
    from epsrt_trainer.networks import build as make
    from epsrt_trainer.presets import PRESETS

    network, folder = PRESETS["ddpm-cifar10"].network, tmp_path_factory.mktemp("ddpm-cifar10")
    shape = (network.image_channels, network.image_size, network.image_size)
    recipe = Recipe(make(network).eval(), shape)
    made = [graph for precision in ("fp32", "fp16") for graph in write_graphs(recipe, precision, folder)]
    manifest = Bundle.open(small_bundle_path).manifest
    facts = {"shape": shape, "max_batch": 256, "graphs": tuple(made), "files": {}}
    return Bundle(folder, msgspec.structs.replace(manifest, **facts))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "features", [("guidance",), ("mask",), ("guidance", "mask"), ("classifier",), ("classifier", "mask")], ids="-".join
)
def test_each_kind_of_step_builds(edited_bundle_path, precision: str, features: tuple[str, ...]) -> None:
    bundle, lib = Bundle.open(edited_bundle_path), library("tensorrt-rtx")
    graph = bundle.graph(precision, features).in_dialect(DIALECT)
    assert (graph.features, graph.file[-14:]) == (features, ".tensorrt.onnx")
    for target in TARGETS if len(features) == 2 else ("sm_89",):
        made = build(lib, bundle, graph, BuildOptions(((1, 2, 8),), targets=(target,)))
        assert made.layers > 300 + 200 * ("classifier" in features)
    layers = describe(lib, bundle, graph)
    halves = {t["type"] for layer in layers if layer["type"] == "CONVOLUTION" for t in layer["outputs"]}
    # a classifier stays in float, whatever the network computes in
    assert halves == {"fp32": {"FLOAT"}, "fp16": {"HALF", *(["FLOAT"] if "classifier" in features else [])}}[precision]
    assert {"name": "x_next", "type": "FLOAT", "shape": [-1, 1, 8, 8]} in [t for la in layers for t in la["outputs"]]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_learned_variance_and_thresholding_build(learned_bundle_path, precision: str) -> None:
    bundle, lib = Bundle.open(learned_bundle_path), library("tensorrt-rtx")
    graph = bundle.graph(precision).in_dialect(DIALECT)
    assert graph.features == ("learned variance", "thresholding")
    for target in TARGETS:
        assert build(lib, bundle, graph, BuildOptions(((1, 2, 4),), targets=(target,))).layers > 20
    kinds = {layer["type"] for layer in describe(lib, bundle, graph)}
    assert {"TOPK", "UNARY"} <= kinds


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_comparison_by_tensors_gets_those_of_the_onnx_file(edited_bundle_path, precision: str, capfd) -> None:
    """All that onnxruntime computes, by the same names, and no word on stdout. Running it needs a GPU."""
    pytest.importorskip("polygraphy", reason="needs epsrt[debug]")
    onnx = pytest.importorskip("onnx")
    bundle = Bundle.open(edited_bundle_path)
    file = bundle.path / bundle.graph(precision).file
    graph = onnx.load(file, load_external_data=False).graph
    tensors = [name for node in graph.node if node.op_type not in ("Shape", "Cast") for name in node.output]
    with layers.silent():
        _, network, *_ = layers.tensorrt_network("tensorrt-rtx", file, tensors)
    shown = {network.get_output(i).name for i in range(network.num_outputs)}
    assert shown <= set(tensors)
    assert len(shown) > 0.9 * len(tensors)
    assert "x_next" in shown
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("size", "ratio"), [(64, 0.995), (64, 0.6876), (256, 0.995)])
def test_thresholding_builds_up_to_the_largest_topk(tmp_path, small_bundle_path, size: int, ratio: float) -> None:
    from epsrt_export.graphs import Recipe, write_graphs
    from epsrt_export.stepgraph import DynamicThreshold

    shape, threshold = (3, size, size), DynamicThreshold(ratio, 1.5)
    (graph,) = write_graphs(Recipe(tiny(channels=3), shape, threshold=threshold), "fp32", tmp_path)
    manifest = msgspec.structs.replace(Bundle.open(small_bundle_path).manifest, shape=shape, graphs=(graph,), files={})
    lib = library("tensorrt-rtx")
    assert build(lib, Bundle(tmp_path, manifest), graph, BuildOptions(((1, 2, 4),), targets=("sm_89",))).layers > 20


def of_family(name: str):
    """A small network of each family: the module, its C, H, W, and what it returns beside its prediction."""
    match name:
        case "dit":
            from epsrt_trainer.dit import DiT, DiTConfig

            return DiT(DiTConfig(1, 8, width=32, depth=2, heads=2, classes=3)), (1, 8, 8), None
        case "diffusers-dit":
            from diffusers import DiTTransformer2DModel

            from epsrt_export.families.diffusers import Denoiser

            size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 5}
            return Denoiser(DiTTransformer2DModel(out_channels=8, sample_size=8, **size), 4), (4, 8, 8), "learned_range"
        case "diffusers-unet":
            from epsrt_export.families.diffusers import Denoiser

            return Denoiser(diffusers_unet(num_class_embeds=3), 3), (3, 8, 8), None
        case "guided-diffusion":
            from epsrt_export.families.adm import ADMConfig, ADMUNet

            config = ADMConfig(
                8,
                num_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(4,),
                learn_sigma=True,
                resblock_updown=True,
                num_classes=3,
            )
            return ADMUNet(config), (3, 8, 8), "learned_range"
        case "latent-diffusion":
            from epsrt_export.families.adm import ADMConfig, ADMUNet

            config = ADMConfig(8, 3, 32, (1, 2), 1, (4,), num_heads=2, num_classes=3, context_dim=16)
            return ADMUNet(config), (3, 8, 8), None
    from epsrt_export.families import lucidrains_unet

    network = lucidrains_unet.theirs().Unet(dim=8, dim_mults=(1, 2))
    lucidrains_unet.adapt(network)
    return network, (3, 8, 8), None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dit", "diffusers-dit", "diffusers-unet", "guided-diffusion", "latent-diffusion", "lucidrains"]
)
def test_each_family_builds(tmp_path, small_bundle_path, name: str) -> None:
    from epsrt_export.graphs import Recipe, write_graphs

    package = {"lucidrains": "denoising_diffusion_pytorch"}.get(name, "diffusers")
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    network, shape, variance = of_family(name)
    recipe = Recipe(network.eval(), shape, labels() if name != "lucidrains" else (), variance)
    (graph,) = write_graphs(recipe, "fp16", tmp_path)
    manifest = msgspec.structs.replace(
        Bundle.open(small_bundle_path).manifest, shape=shape, graphs=(graph,), variance=variance, files={}
    )
    lib = library("tensorrt-rtx")
    for each in (graph, graph.in_dialect(DIALECT)):
        assert build(lib, Bundle(tmp_path, manifest), each, BuildOptions(((1, 2, 4),), targets=("sm_89",))).layers > 50


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_builds_for_each_target(graphs: Bundle, precision: str) -> None:
    lib, graph, told = library("tensorrt-rtx"), graphs.graph(precision).in_dialect(DIALECT), []
    for target in TARGETS:
        options = BuildOptions(((1, 8, 256),), targets=(target,))
        made = build(lib, graphs, graph, options, on_progress=lambda name, share: told.append(share))
        assert made.layers > 500
        assert holds_the_weights(made.data, graphs, graph)
    assert (told[0], max(told), len(told) > 500) == (0.0, 1.0, True)


def holds_the_weights(data: bytes, bundle: Bundle, graph: StepGraph) -> bool:
    weights = (bundle.path / graph.weights).stat().st_size
    return 0.5 * weights < len(data) < 10 * weights + (16 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_its_dialect_spares_shuffles(graphs: Bundle, precision: str) -> None:
    """A norm is one layer in both, and without the reshapes around it in TensorRT's own. Both build."""
    lib, plain = library("tensorrt-rtx"), graphs.graph(precision)
    kinds = {
        file: Counter(layer["type"] for layer in describe(lib, graphs, plain.in_dialect(file)))
        for file in ("cpu", DIALECT)
    }
    norms = kinds["cpu"]["NORMALIZATION"]
    assert norms == kinds[DIALECT]["NORMALIZATION"] > 20
    assert kinds["cpu"]["SHUFFLE"] - kinds[DIALECT]["SHUFFLE"] == 6 * norms
    assert build(lib, graphs, plain, BuildOptions(((1, 8, 256),), targets=("sm_89",))).layers > 500


@pytest.mark.slow
def test_half_precision_is_what_the_graph_says(graphs: Bundle) -> None:
    """Strongly typed: convolutions and products in half, softmax, norms and the fused step in float."""
    layers = describe(library("tensorrt-rtx"), graphs, graphs.graph("fp16").in_dialect(DIALECT))
    types = {
        kind: {t["type"] for layer in layers if layer["type"] == kind for t in layer["outputs"]}
        for kind in ("CONVOLUTION", "MATRIX_MULTIPLY", "SOFTMAX", "NORMALIZATION")
    }
    assert types["CONVOLUTION"] == {"HALF"}
    assert types["SOFTMAX"] == types["NORMALIZATION"] == {"FLOAT"}
    assert "HALF" in types["MATRIX_MULTIPLY"]


def test_refusals_are_sentences(small_bundle_path, tmp_path) -> None:
    bundle, lib = Bundle.open(small_bundle_path), library("tensorrt-rtx")
    graph = bundle.graph("fp32")
    with pytest.raises(EngineError, match="tensorrt-rtx .* has no target sm_90: use one of sm75, sm80, sm86"):
        build(lib, bundle, graph, BuildOptions(targets=("sm_90",)))
    (tmp_path / graph.file).write_bytes(b"no model")
    being_made = Bundle(tmp_path, msgspec.structs.replace(bundle.manifest, files={}))
    with pytest.raises(EngineError, match="cannot parse .*step-fp32.onnx"):
        build(lib, being_made, graph, BuildOptions(targets=("sm_89",)))


def test_an_exception_from_the_progress_ends_the_build(small_bundle_path) -> None:
    bundle, calls = Bundle.open(small_bundle_path), []

    def stop(name: str, share: float) -> None:
        calls.append(share)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(library("tensorrt-rtx"), bundle, bundle.graph("fp32"), BuildOptions(targets=("sm_89",)), on_progress=stop)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("precision", "features"), [("fp32", ()), ("fp16", ("guidance", "mask"))], ids=["plain-fp32", "guidance-mask-fp16"]
)
def test_dynamic_sizes_build(tmp_path, small_bundle_path, precision: str, features: tuple[str, ...]) -> None:
    """A U-Net with attention, whose reshapes are by shapes that the graph computes."""
    from epsrt_export.graphs import Recipe, write_graphs

    sizes = Sizes(2, 24)
    network = unet(channels=3, classes=3)
    recipe = Recipe(network, (3, 8, 8), labels(3), sizes=sizes, variants=(features,))
    (graph,) = write_graphs(recipe, precision, tmp_path)
    manifest = Bundle.open(small_bundle_path).manifest
    manifest = msgspec.structs.replace(
        manifest, format=FORMAT, shape=(3, 8, 8), graphs=(graph,), sizes=sizes, classes=3, null_label=3, files={}
    )
    bundle, lib = Bundle(tmp_path, manifest), library("tensorrt-rtx")
    graph = graph.in_dialect(DIALECT)
    assert build(lib, bundle, graph, BuildOptions(targets=("sm_89",))).layers > 500
    tensors = [t for layer in describe(lib, bundle, graph) for t in layer["outputs"]]
    assert {"name": "x_next", "type": "FLOAT", "shape": [-1, 3, -1, -1]} in tensors


@pytest.mark.parametrize("name", ["decode", "encode", "preview"])
def test_parts_build_at_all_their_sizes(latent_bundle_path, name: str) -> None:
    bundle, lib = Bundle.open(latent_bundle_path), library("tensorrt-rtx")
    part = bundle.part(name)
    assert build(lib, bundle, part, BuildOptions(((1, 2, 4),), targets=("sm_89",))).layers >= 3
    tensors = [t for layer in describe(lib, bundle, part) for t in layer["outputs"]]
    output = part.outputs[0]
    assert {"name": output.name, "type": "FLOAT", "shape": [-1, output.shape[0], -1, -1]} in tensors


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["every role", "signal", "volume"])
def test_conditions_and_every_rank_build(tmp_path, small_bundle_path, kind: str, precision: str) -> None:
    """Guided by all that may be guided, with a mask and free sizes: the largest graph."""
    import conditional
    from epsrt_export.graphs import Recipe, write_graphs

    classes, conditions, sizes = 0, (), Sizes(4, 24)
    if kind == "every role":
        shape, classes = (1, 8, 8), 3
        conditions = (conditional.CONTEXT, conditional.SEEN, conditional.POOLED, conditional.RATE, conditional.LOW)
        network = redraw(conditional.Conditioned(shape, conditions, classes + 1))
    else:
        network, facts = conditional.conditioned(kind)
        shape = facts["shape"]
        sizes = Sizes((4, 2, 4), (4, 8, 12)) if kind == "volume" else sizes  # its depth stays as it is
    takes = (*(labels(classes) if classes else ()), *conditions)
    features = ("guidance", "mask") if takes else ("mask",)
    (graph,) = write_graphs(Recipe(network, shape, takes, sizes=sizes, variants=(features,)), precision, tmp_path)
    manifest = msgspec.structs.replace(
        Bundle.open(small_bundle_path).manifest,
        format=FORMAT,
        shape=shape,
        graphs=(graph,),
        sizes=sizes,
        classes=classes,
        null_label=classes or None,
        conditions=conditions,
        files={},
    )
    bundle, lib = Bundle(tmp_path, manifest), library("tensorrt-rtx")
    graph = graph.in_dialect(DIALECT)
    assert build(lib, bundle, graph, BuildOptions(((1, 2, 4),), targets=("sm_89",))).layers > 50
    outputs = [t for layer in describe(lib, bundle, graph) for t in layer["outputs"]]
    assert {"name": "x_next", "type": "FLOAT", "shape": [-1, *manifest.free]} in outputs


@pytest.mark.slow
@pytest.mark.parametrize("codes", [0, 8], ids=["kl", "vq"])
def test_parts_build_in_both_precisions(tmp_path, latent_bundle_path, codes: int) -> None:
    from epsrt_export.parts import write_parts

    manifest = msgspec.structs.replace(Bundle.open(latent_bundle_path).manifest, files={})
    made = write_parts(autoencoder(codes=codes), manifest, ("fp32", "fp16"), 21, tmp_path)
    bundle, lib = Bundle(tmp_path, manifest), library("tensorrt-rtx")
    halves = [(name, part) for name, parts in made.items() for part in parts]
    assert {(name, part.precision) for name, part in halves} == {
        (name, precision) for name in ("decode", "encode") for precision in ("fp32", "fp16")
    }
    for name, part in halves:
        assert build(lib, bundle, part, BuildOptions(((1, 2, 4),), targets=("sm_89",))).layers >= 5
        kinds = {t["type"] for layer in describe(lib, bundle, part) for t in layer["outputs"]}
        assert ("HALF" in kinds) == (part.precision == "fp16"), (name, part.precision, kinds)
