"""epsrt.verify: a good bundle passes, a damaged weight does not, and the figures are what they say."""

import numpy as np
import pytest

from epsrt import Bundle, open_engine
from epsrt.parity.measure import LIMITS, relative_l2, worst_psnr
from epsrt.parity.rungs import DIFFERS
from epsrt.verify import verify
from helpers import edit_graph, forge, weights

NAMES = ["network", "conditions", "step", "ddim-50", "ddpm-100", "batch"]
UNCONDITIONAL = [name for name in NAMES if name != "conditions"]


def measured(path, precision="fp32", **more):
    engine = open_engine(Bundle.open(path), "onnxruntime", precision=precision, threads=1)
    try:
        return {rung.name: rung for rung in verify(engine, **more)}
    finally:
        engine.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_good_bundle_passes_every_rung(bundle_path, precision):
    rungs = measured(bundle_path, precision)
    assert list(rungs) == NAMES
    assert all(rung.passed for rung in rungs.values())
    step, psnr = LIMITS["cpu", precision]
    assert [rung.limit for rung in rungs.values()] == [step, DIFFERS, step, psnr, psnr, step]
    assert {(rung.engine, rung.precision) for rung in rungs.values()} == {("onnxruntime", precision)}
    assert [name for name, rung in rungs.items() if rung.unit == "dB"] == NAMES[3:5]
    assert {rung.unit for rung in rungs.values()} == {"relative L2", "dB"}
    assert rungs["network"].figure > 0  # a comparison, not of a thing with itself


def test_limits_are_the_designs():
    assert LIMITS["cpu", "fp32"] == (2e-6, 100.0)
    assert LIMITS["cpu", "fp16"] == (1e-3, 55.0)


@pytest.mark.parametrize("name", ["network", "step"])
def test_errors_are_given_by_timestep_across_the_schedule(bundle_path, name):
    network = measured(bundle_path, "fp16")[name]
    ts = [t for t, _ in network.by_timestep]
    assert len(ts) >= 20
    assert ts == sorted(set(ts))
    assert (ts[0], ts[-1]) == (0, 99)
    worst = max(network.by_timestep, key=lambda pair: pair[1])
    assert network.where == f"t = {worst[0]}"
    assert network.figure == worst[1]


def test_what_it_measures_is_what_the_export_stored(bundle_path):
    stored = {(r.name, r.precision): r for r in Bundle.open(bundle_path).parity() if r.graph == ""}
    for precision in ("fp32", "fp16"):
        for name, rung in measured(bundle_path, precision).items():
            if name == "conditions":  # the bundle is older than it
                continue
            assert rung.figure == pytest.approx(stored[name, precision].figure, rel=0.2)
            assert rung.limit == stored[name, precision].limit


def test_trajectories_have_not_collapsed(bundle_path):
    """Otherwise agreement would be cheap."""
    golden = Bundle.open(bundle_path).golden()
    for name in ("ddim-50", "ddpm-100"):
        x = golden.trajectories[name].x
        assert 0.2 < x.std() < 1
        assert (np.abs(x) < 0.999).mean() > 0.3
        assert np.abs(x[0] - x[1]).max() > 0.3
    out = golden.network.out
    assert 0.5 < np.sqrt(np.square(out).mean()) < 2


@pytest.mark.parametrize("name", ["time_embed.weight", "middle.weight"])
def test_a_damaged_weight_is_found(copy_of, bundle_path, name):
    path = copy_of(bundle_path)
    values = weights(path, name)
    values[-1] *= 1.01
    values.flush()
    forge(path)
    rungs = measured(path)
    assert not rungs["network"].passed
    assert rungs["batch"].passed  # it is wrong in the same way in every batch


def test_damage_at_one_timestep_is_found_there(copy_of, small_bundle_path):
    path = copy_of(small_bundle_path)
    weights(path, "time_embed.weight")[4] += 0.01
    forge(path)
    rungs = measured(path)
    for rung in (rungs["network"], rungs["step"]):
        assert not rung.passed
        assert rung.where == "t = 4"
        assert all(error <= rung.limit for t, error in rung.by_timestep if t != 4)


OPTIONS = ["network", "variance", "threshold", "step", "ddim-50", "ddpm-100", "batch"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_learned_variance_and_thresholding_have_rungs(learned_bundle_path, precision):
    told = []
    rungs = measured(learned_bundle_path, precision, on_progress=lambda name, fraction: told.append(name))
    assert list(rungs) == list(dict.fromkeys(told)) == OPTIONS
    assert all(rung.passed for rung in rungs.values())
    limit = LIMITS["cpu", precision][0]
    assert rungs["variance"].limit == rungs["threshold"].limit == limit
    assert len(rungs["variance"].by_timestep) == 25
    assert rungs["variance"].figure > 0


@pytest.mark.parametrize(("name", "missed"), [("spread.weight", "variance"), ("head.weight", "network")])
def test_each_half_of_the_output_is_compared(copy_of, learned_bundle_path, name, missed):
    path = copy_of(learned_bundle_path)
    values = weights(path, name)
    values[0] *= 1.001
    values.flush()
    forge(path)
    rungs = measured(path)
    assert not rungs[missed].passed
    assert not rungs["step"].passed
    other = {"variance": "network", "network": "variance"}[missed]
    assert rungs[other].passed
    assert rungs["ddim-50"].passed == (missed == "variance")  # it adds no noise


def test_another_variance_than_the_networks_is_found(copy_of, learned_bundle_path):
    """The network is right, and exp(r·v) is not in the step."""

    def without(model):
        (exp,) = [node for node in model.graph.node if node.op_type == "Exp"]
        exp.op_type = "Identity"

    path = copy_of(learned_bundle_path)
    edit_graph(path / "step-fp32.onnx", without)
    forge(path)
    rungs = measured(path)
    assert {name for name, rung in rungs.items() if not rung.passed} == {"variance", "step", "ddpm-100"}


def test_nan_is_a_miss_and_no_exception(copy_of, small_bundle_path):
    path = copy_of(small_bundle_path)
    weights(path, "time_embed.weight")[:] = np.nan
    forge(path)
    rungs = measured(path)
    assert list(rungs) == UNCONDITIONAL
    assert not any(rung.passed for rung in rungs.values())
    assert all(rung.figure is None and "not finite" in rung.where for rung in rungs.values())


def test_a_wrong_step_around_a_right_network_is_found(copy_of, small_bundle_path):
    """The affine step's noise is dropped: the network is as it was."""

    def noise_is_memory(model):
        (node,) = [node for node in model.graph.node if "z" in node.input]
        node.input[list(node.input).index("z")] = "m"

    path = copy_of(small_bundle_path)
    edit_graph(path / "step-fp32.onnx", noise_is_memory)
    forge(path)
    rungs = measured(path)
    assert rungs["network"].passed
    assert rungs["ddim-50"].passed  # it adds no noise
    assert not rungs["step"].passed
    assert not rungs["ddpm-100"].passed


def test_progress_goes_from_0_to_1(small_bundle_path):
    told = []
    measured(small_bundle_path, on_progress=lambda name, fraction: told.append((name, fraction)))
    assert list(dict.fromkeys(name for name, _ in told)) == UNCONDITIONAL
    for name in UNCONDITIONAL:
        fractions = [fraction for each, fraction in told if each == name]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


def test_figures():
    a = np.array([3.0, 4.0])
    assert relative_l2(a, a) == 0
    assert relative_l2(np.array([3.0, 4.5]), a) == pytest.approx(0.1)
    images = np.zeros((2, 1, 2, 2), np.float32)
    other = images.copy()
    other[1] += 0.2
    assert worst_psnr(other, images, (-1.0, 1.0)) == pytest.approx(20.0, abs=1e-5)
    assert worst_psnr(other[:1], images[:1], (-1.0, 1.0)) == 300
