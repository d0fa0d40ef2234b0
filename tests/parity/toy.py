"""A float64 toy network that is sensible at every level of every schedule, and a plain runner of plans."""

import numpy as np
import torch

MEAN, WIDTH = 0.4, 0.6  # of the Gaussian data
SIGMA_DATA = 0.5  # edm's: deliberately not WIDTH


class Toy:
    """The optimal denoiser of N(MEAN, WIDTH²) data plus a small smooth nonlinearity, in any prediction.

    So an unclipped trajectory stays of order 1, and a clipped one does clip. `learned` adds a second half to the
    output: around so much, for a learned variance.
    """

    def __init__(self, schedule, prediction="epsilon", learned=None):
        self.schedule, self.prediction, self.learned = schedule, prediction, learned
        generator = torch.Generator().manual_seed(7)
        self.mix = torch.randn(12, 12, generator=generator, dtype=torch.float64) / 12**0.5

    def __call__(self, x, t, label=None):
        t = float(torch.as_tensor(t, dtype=torch.float64).flatten()[0])
        if self.prediction == "edm":  # x arrives as c_in·x/α, t as ln(σ/α)/4: arXiv 2206.00364, table 1
            _, alpha, sigma = (float(v) for v in self.schedule.level(np.array(-4 * t)))
            x = x * alpha * np.sqrt((sigma / alpha) ** 2 + SIGMA_DATA**2)
        else:
            alpha, sigma = (float(v) for v in self.schedule.at(t))
        out = self.said(x, alpha, sigma)
        if self.learned is not None:
            out = torch.cat([out, self.learned + torch.tanh(x @ self.mix - x)], dim=1)
        return out

    def said(self, x, alpha, sigma):
        """The prediction of x = α·x0 + σ·ε."""
        x0, eps = self.x0(x, alpha, sigma), self.epsilon(x, alpha, sigma)
        match self.prediction:
            case "epsilon":
                return eps
            case "x0":
                return x0
            case "v":
                return alpha * eps - sigma * x0
            case "score":
                return -eps / sigma
            case "velocity":
                return eps - x0
        s = sigma / alpha
        skip, out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / np.sqrt(s**2 + SIGMA_DATA**2)
        return (x0 - skip * x / alpha) / out

    def x0(self, x, alpha, sigma):
        x, alpha, sigma, bend = self._unit(x, alpha, sigma)
        return (alpha * WIDTH**2 * x + sigma**2 * MEAN) / (alpha**2 * WIDTH**2 + sigma**2) - 0.1 * sigma * bend

    def epsilon(self, x, alpha, sigma):
        x, alpha, sigma, bend = self._unit(x, alpha, sigma)
        return sigma * (x - alpha * MEAN) / (alpha**2 * WIDTH**2 + sigma**2) + 0.1 * alpha * bend

    def _unit(self, x, alpha, sigma):
        """In units where α² + σ² = 1."""
        unit = np.hypot(alpha, sigma)
        x = x / unit
        return x, alpha / unit, sigma / unit, torch.tanh(x + x @ self.mix)


def draw(steps, seed=0, images=64):
    """z for x at the start and one a row, float64."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(steps + 1, images, 12, generator=generator, dtype=torch.float64)
    return both[0], both[1:]


def largest(a, b):
    return float((a - b).abs().max())


def begin(plan, x):
    """x as the plan's start makes it, of noise or (inversion) of images."""
    signal, noise = plan.start
    assert signal == 0 or noise == 0
    return (noise or signal) * x


def run_plan(plan, network, x, z, dtype=np.float64, threshold=None, known=None, mask=0.0, z2=None):
    """The affine step of the design, row by row; the coefficients are rounded to `dtype` first. `threshold` as the
    step graph has it: of [B, C, H, W]. `known` is kept where `mask` is 1, noised by z2[i]."""
    x = begin(plan, x)
    m = torch.zeros_like(x)
    for i in range(len(plan)):
        k = {name: float(dtype(plan[name][i])) for name in ("in_scale", "clip", "r", "ka", "kb", *"pqabhcdefog")}
        both = network(k["in_scale"] * x, torch.full((len(x),), plan["t"][i], dtype=torch.float64))
        out, v = both[:, :12], both[:, 12:]
        noise = k["d"] * z[i] * (torch.exp(k["r"] * v) if v.numel() else 1.0)
        x0 = k["p"] * x + k["q"] * out
        if threshold is not None:
            x0 = threshold(x0[..., None, None])[..., 0, 0]
        x0 = torch.clamp(x0, -k["clip"], k["clip"])
        x, m = (
            k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + noise,
            k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m,
        )
        if known is not None:
            x = mask * (k["ka"] * known + k["kb"] * z2[i]) + (1 - mask) * x
    return x
