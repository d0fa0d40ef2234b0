"""Constants are PyTorch's own, bit for bit, and only constants are folded."""

import math

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from epsrt.plan import STEP_COLUMNS, Plan
from epsrt_export.folding import fold_constants
from epsrt_export.onnx_graph import to_onnx
from epsrt_export.stepgraph import StepModule

SHAPE = (1, 8, 8)


class Sinusoidal(nn.Module):
    """As most networks are told the time: frequencies made in forward."""

    def __init__(self, half=128, noisy=True):
        super().__init__()
        self.noisy = noisy
        self.half = half
        self.mix = nn.Linear(2 * half, 8)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x, t):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(self.half, dtype=torch.float32) / (self.half - 1))
        angle = t[:, None] * frequencies[None]
        out = self.mix(torch.cat([angle.sin(), angle.cos()], 1))
        noise = (
            0 * torch.rand(()) if self.noisy else 0.0
        )  # neither this nor a buffer, nor what has the batch's size, is a constant
        return x + out[:, None, None, :] * torch.exp(self.shift) + noise + 0 * torch.zeros(x.shape[0], 1, 1, 1)


def program_of(network, n=3):
    batch = torch.export.Dim.DYNAMIC
    given = torch.zeros(n, *SHAPE), torch.zeros(n)
    return torch.export.export(network.eval(), given, dynamic_shapes=({0: batch}, {0: batch}))


def test_frequencies_become_one_constant_with_their_bits():
    program = program_of(Sinusoidal())
    assert fold_constants(program) == 1
    (frequencies,) = program.constants.values()
    exact = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 127)
    assert torch.equal(frequencies.flatten(), exact)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("arange" in target for target in targets)
    assert sum("exp.default" in target for target in targets) == 1  # of the buffer
    assert any("rand" in target for target in targets)
    assert fold_constants(program) == 0


def test_the_program_still_runs_at_any_batch():
    network, program = Sinusoidal(), program_of(Sinusoidal())
    fold_constants(program)
    network.load_state_dict(program.state_dict)
    x, t = torch.randn(7, *SHAPE), torch.linspace(0, 999, 7)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x, t), network(x, t), rtol=0, atol=0)


def test_a_large_timestep_is_told_exactly():
    """Without folding the angles are 6e-5 off at t = 1000, and out by 8e-6, relative."""
    network = Sinusoidal(noisy=False).eval()
    model = to_onnx(StepModule(network, STEP_COLUMNS, (), torch.float32), SHAPE)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    t = np.array([999, 998, 750], np.float32)
    rows = Plan.of("out", t=t, h=1.0).rows(STEP_COLUMNS)
    zeros = np.zeros((3, *SHAPE), np.float32)
    out = session.run(["x_next"], {"x": zeros, "m": zeros, "z": zeros, "rows": rows})[0]
    with torch.no_grad():
        truth = network(torch.from_numpy(zeros), torch.from_numpy(t)).numpy()
    assert np.linalg.norm(out - truth) < 1e-6 * np.linalg.norm(truth)
