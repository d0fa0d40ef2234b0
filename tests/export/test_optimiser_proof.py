"""The rung "optimisation" sees what an optimiser drops, and sees it where nothing else does."""

import os
import sys

import numpy as np
import pytest
import torch
from onnxscript import rewriter

from epsrt import Schedule
from epsrt.plan import STEP_COLUMNS
from epsrt_export import export_network
from epsrt_export.onnx_graph import WeightsFile, to_onnx
from epsrt_export.optimiser_proof import OptimiserProof
from epsrt_export.parity import LeftOutWarning, ParityError
from epsrt_export.stepgraph import StepModule
from nets import Tiny, redraw, tiny

optimiser = sys.modules["epsrt_export.optimiser"]
SHAPE = (1, 8, 8)


class Normed(Tiny):
    """Its denominator is 0 for an image of zeros alone."""

    def forward(self, x, t):
        return super().forward(4 * x / (x.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-15), t) + x


class Magnified(Tiny):
    """A factor near 1 matters, and matters always."""

    def forward(self, x, t):
        one = 1 + (x > 0).to(x.dtype)
        return super().forward(x + 1e4 * (one * (1 + 5e-6) - one), t)


@pytest.fixture
def fault(monkeypatch):
    """onnxscript's own rules."""
    monkeypatch.setattr(optimiser, "RULES", rewriter._DEFAULT_REWRITE_RULES)


def put(path, network, **more):
    return export_network(
        network, Schedule(T=20), path, shape=SHAPE, **{"precisions": ("fp32",), "max_batch": 2, **more}
    )


def proven(network):
    proof = OptimiserProof(STEP_COLUMNS, (10.0, 0.0))
    to_onnx(StepModule(network, STEP_COLUMNS, (), torch.float32), SHAPE, proof=proof)
    return proof.rung("fp32", "")


class TestTheRung:
    @pytest.mark.parametrize("kind", [Normed, Magnified])
    def test_passes_and_is_stored(self, tmp_path, kind):
        rungs = [r for r in put(tmp_path / "some.epsrt", redraw(kind())).parity() if r.name == "optimisation"]
        assert [(r.engine, r.precision, r.limit, r.graph) for r in rungs] == [("onnxruntime", "fp32", 2e-6, "")]
        assert rungs[0].figure < 1e-7

    def test_a_dropped_summand_that_only_zeros_show(self, tmp_path, fault):
        """Without this rung the bundle would be written: on N(0, I) its graph is right."""
        message = (
            "parity missed: optimisation in fp32 on onnxruntime has no figure, for zeros, of which it made others not "
            "finite; no bundle was written"
        )
        with pytest.raises(ParityError, match=message):
            put(tmp_path / "some.epsrt", redraw(Normed()))
        assert os.listdir(tmp_path) == []

    def test_nothing_else_shows_it(self, tmp_path, fault, monkeypatch):
        passed = proven(tiny())
        monkeypatch.setattr(OptimiserProof, "rung", lambda self, *args: passed)
        assert all(r.passed for r in put(tmp_path / "some.epsrt", redraw(Normed())).parity())

    def test_a_dropped_factor(self, fault):
        rung = proven(redraw(Magnified()))
        assert rung.figure > 1e-3
        assert not rung.passed

    def test_the_graph_is_the_same_with_and_without_a_proof(self):
        step = StepModule(tiny(), STEP_COLUMNS, (), torch.float32)
        plain = to_onnx(step, SHAPE, weights=WeightsFile("weights.bin"))
        assert (
            to_onnx(step, SHAPE, weights=WeightsFile("weights.bin"), proof=OptimiserProof(STEP_COLUMNS, (10.0, 0.0)))
            == plain
        )

    def test_every_output_is_looked_at(self, monkeypatch):
        """x' and x0, in both states."""
        proof = OptimiserProof(STEP_COLUMNS, (10.0, 0.0))
        to_onnx(StepModule(tiny(), STEP_COLUMNS, (), torch.float32), SHAPE, proof=proof)
        assert proof.rung("fp32", "").figure == 0
        for output in (0, 1):
            for state in (0, 1):
                kept = proof._after[output].copy()
                proof._after[output][state] *= np.float32(1.00001)
                rung = proof.rung("fp32", "")
                assert rung.figure == pytest.approx(1e-5, rel=0.02)
                assert rung.where.startswith(("noise", "zeros")[state])
                proof._after[output] = kept

    def test_of_half_precision_zeros_need_only_be_finite(self):
        proof = OptimiserProof(STEP_COLUMNS, (10.0, 0.0))
        before = np.ones((2, *SHAPE), np.float32)
        proof._outputs, proof._after = [before] * 2, [before * 1.0015, before * np.float32([1, 3])[:, None, None, None]]
        assert proof.rung("fp16", "").figure == pytest.approx(1.5e-3, rel=1e-3)
        assert proof.rung("fp16", "").passed
        assert not proof.rung("fp32", "").passed
        proof._after[1][1, 0, 0, 0] = np.nan
        assert proof.rung("fp16", "").figure is None

    def test_what_was_not_finite_before_may_stay_so(self):
        proof = OptimiserProof(STEP_COLUMNS, (10.0, 0.0))
        before = np.ones((2, *SHAPE), np.float32)
        before[0, 0, 0, 0], before[1] = np.inf, np.nan
        proof._outputs = proof._after = [before, before]
        assert proof.rung("fp32", "guidance").figure == 0
        proof._after = [before, np.nan_to_num(before)]
        assert proof.rung("fp32", "guidance").figure is None

    def test_an_fp16_that_misses_it_is_left_out(self, tmp_path, monkeypatch):
        rung = OptimiserProof.rung

        def missed(self, precision, stem):
            if precision == "fp16":
                self._after[0] = self._after[0] * np.float32(1.01)
            return rung(self, precision, stem)

        monkeypatch.setattr(OptimiserProof, "rung", missed)
        with pytest.warns(LeftOutWarning, match="is written without fp16: optimisation in fp16 on onnxruntime is 0.01"):
            bundle = put(tmp_path / "some.epsrt", tiny(), precisions=None)
        assert [g.precision for g in bundle.manifest.graphs] == ["fp32"]
        assert not [name for name in os.listdir(bundle.path) if "fp16" in name]
        assert "fp16" not in {r.precision for r in bundle.parity()}
