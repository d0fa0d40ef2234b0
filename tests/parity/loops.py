"""Samplers written plainly from their papers, in their symbols, in float64. None of them knows a Plan.

A level is (α, σ) with x = α·x0 + σ·ε; levels descend from noise, and (1, 0) comes after the last. z[i] is the i-th
step's noise. x0(x, α, σ) and the like are the network's estimates at a level, clipped or not.
"""

from itertools import pairwise
from math import exp, inf, log, sqrt

import torch

CLEAN = (1.0, 0.0)


def edm_denoiser(F, sigma_data, clip=None):
    """EDM (arXiv 2206.00364), eq. 7 and table 1: D(x; σ) = c_skip x + c_out F(c_in x, c_noise)."""

    def D(x, sigma):
        total = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / sqrt(total)
        x0 = c_skip * x + c_out * F(x / sqrt(total), log(sigma) / 4)
        return x0 if clip is None else x0.clamp(-clip, clip)

    return D


def edm(D, sigmas, x, z, S_churn=0.0, S_tmin=0.0, S_tmax=inf, S_noise=1.0, second_order=True):
    """EDM's algorithm 2; without lines 6 to 8 it is Euler's method. x begins as σ·z."""
    N = len(sigmas)
    for i, (t, t_next) in enumerate(pairwise([*sigmas, 0.0])):
        gamma = min(S_churn / N, sqrt(2) - 1) if S_tmin <= t <= S_tmax else 0.0
        t_hat = t + gamma * t
        x_hat = x + sqrt(t_hat**2 - t**2) * S_noise * z[i]
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if second_order and t_next != 0:
            d_next = (x - D(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d / 2 + d_next / 2)
    return x


def euler_ancestral(D, sigmas, x, z, eta=1.0):
    """k-diffusion's sample_euler_ancestral."""
    for i, (sigma, to) in enumerate(pairwise([*sigmas, 0.0])):
        up = min(to, eta * sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
        down = sqrt(to**2 - up**2)
        x = x + (x - D(x, sigma)) / sigma * (down - sigma)
        if to > 0:
            x = x + up * z[i]
    return x


def euler_maruyama_vp(score, betas, x, z):
    """Song et al. (arXiv 2011.13456), eq. 6 with f = −½βx, g² = β over every step; the last adds no noise."""
    for i, t in enumerate(reversed(range(len(betas)))):
        beta = float(betas[t])
        x = x + beta / 2 * x + beta * score(x, t)
        if t > 0:
            x = x + sqrt(beta) * z[i]
    return x


def euler_maruyama_ve(score, sigmas, x, z):
    """The same with f = 0, g² = d(σ²)."""
    for i, (sigma, to) in enumerate(pairwise([*sigmas, 0.0])):
        g2 = sigma**2 - to**2
        x = x + g2 * score(x, sigma)
        if to > 0:
            x = x + sqrt(g2) * z[i]
    return x


def annealed_langevin(score, sigmas, x, z, T, epsilon, denoise):
    """NCSN (arXiv 1907.05600), algorithm 1; then x + σ²·score, if asked for (arXiv 2009.05475, section 3)."""
    z = iter(z)
    for sigma in sigmas:
        alpha = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(T):
            x = x + alpha / 2 * score(x, sigma) + sqrt(alpha) * next(z)
    return x + sigmas[-1] ** 2 * score(x, sigmas[-1]) if denoise else x


def _lambda(level):
    return log(level[0] / level[1])


def dpm_solver_pp_2s(x0, levels, at_lambda, x, r=0.5):
    """DPM-Solver++ (arXiv 2211.01095), algorithm 1. at_lambda(λ) is a level. The step to σ = 0 is x0."""
    for (alpha, sigma), (alpha_t, sigma_t) in pairwise(levels):
        h = log(alpha_t / sigma_t) - log(alpha / sigma)
        alpha_s, sigma_s = at_lambda(log(alpha / sigma) + r * h)
        now = x0(x, alpha, sigma)
        u = sigma_s / sigma * x - alpha_s * (exp(-r * h) - 1) * now
        D = (1 - 1 / (2 * r)) * now + 1 / (2 * r) * x0(u, alpha_s, sigma_s)
        x = sigma_t / sigma * x - alpha_t * (exp(-h) - 1) * D
    return x0(x, *levels[-1])


def dpm_solver_pp_2m(x0, levels, x):
    """DPM-Solver++, algorithm 2. The step to σ = 0 is x0."""
    previous = h_previous = None
    for level, after in pairwise(levels):
        h = _lambda(after) - _lambda(level)
        D = now = x0(x, *level)
        if previous is not None:
            r = h_previous / h
            D = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * previous
        x = after[1] / level[1] * x - after[0] * (exp(-h) - 1) * D
        previous, h_previous = now, h
    return x0(x, *levels[-1])


def sde_dpm_solver_pp_2m(x0, levels, x, z):
    """SDE-DPM-Solver++(2M), eq. 18 in its midpoint form."""
    previous = h_previous = None
    for i, (level, after) in enumerate(pairwise(levels)):
        h = _lambda(after) - _lambda(level)
        D = now = x0(x, *level)
        if previous is not None:
            D = now + h / h_previous / 2 * (now - previous)
        noise = after[1] * sqrt(1 - exp(-2 * h)) * z[i]
        x = after[1] / level[1] * exp(-h) * x + after[0] * (1 - exp(-2 * h)) * D + noise
        previous, h_previous = now, h
    return x0(x, *levels[-1])


def flow_euler(velocity, s, x):
    """Rectified flow (arXiv 2209.03003), eq. 1: dx/ds = v(x, s) from s = 1 down to 0."""
    for now, after in pairwise([*s, 0.0]):
        x = x + (after - now) * velocity(x, now)
    return x


def flow_heun(velocity, s, x):
    """Heun's method for it; the last step is Euler's."""
    for now, after in pairwise([*s, 0.0]):
        d = velocity(x, now)
        ahead = x + (after - now) * d
        x = x + (after - now) * (d + velocity(ahead, after)) / 2 if after > 0 else ahead
    return x


def ddim_inversion(epsilon, levels, x, clip=None):
    """DDIM upwards (arXiv 2010.02502, section 4.3), ε asked for at the level that a step goes to. Levels ascend."""
    for (alpha, sigma), (alpha_to, sigma_to) in pairwise([CLEAN, *levels]):
        eps = epsilon(x, alpha_to, sigma_to)
        x0 = (x - sigma * eps) / alpha
        if clip is not None:
            x0 = torch.clamp(x0, -clip, clip)
        x = alpha_to * x0 + sigma_to * eps
    return x
