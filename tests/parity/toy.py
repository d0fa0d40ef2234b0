"""A float64 toy network that is sensible at every timestep, and a plain runner of plans."""

import numpy as np
import torch

MEAN, WIDTH = 0.4, 0.6  # of the Gaussian data


class Toy:
    """The optimal ε for N(MEAN, WIDTH²) data plus a small smooth nonlinearity, as ε, x0 or v.

    So an unclipped trajectory stays of order 1, and a clipped one does clip.
    """

    def __init__(self, schedule, prediction="epsilon"):
        self.alpha_bar, self.prediction = schedule.alpha_bar, prediction
        generator = torch.Generator().manual_seed(7)
        self.mix = torch.randn(12, 12, generator=generator, dtype=torch.float64) / 12**0.5

    def __call__(self, x, t, label=None):
        A = float(self.alpha_bar[int(torch.as_tensor(t).flatten()[0])])
        bend = torch.tanh(x + x @ self.mix)
        eps = np.sqrt(1 - A) * (x - np.sqrt(A) * MEAN) / (A * WIDTH**2 + 1 - A) + 0.1 * np.sqrt(A) * bend
        x0 = (x - np.sqrt(1 - A) * eps) / np.sqrt(A)
        return {"epsilon": eps, "x0": x0, "v": np.sqrt(A) * eps - np.sqrt(1 - A) * x0}[self.prediction]


def draw(steps, seed=0, images=64):
    """x_T and one z a step, float64."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(steps + 1, images, 12, generator=generator, dtype=torch.float64)
    return both[0], both[1:]


def run_plan(plan, network, x, z, dtype=np.float64):
    """The affine step of the design, row by row; the coefficients are rounded to `dtype` first."""
    m = torch.zeros_like(x)
    for i in range(len(plan)):
        k = {name: float(dtype(plan[name][i])) for name in ("in_scale", "clip", *"pqabhcdefog")}
        out = network(k["in_scale"] * x, torch.full((len(x),), plan["t"][i]))
        x0 = torch.clamp(k["p"] * x + k["q"] * out, -k["clip"], k["clip"])
        x, m = (
            k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + k["d"] * z[i],
            k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m,
        )
    return x
