"""Guidance, classifier-free and by a classifier, against plain PyTorch loops, a sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epsrt import Sampler, noise
from nets import judge

STEPS = 8
TOLERANCE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def sampler(edited_bundle_path):
    with Sampler.open(edited_bundle_path, "onnxruntime", threads=1) as opened:
        yield opened


def rescaled(guided, c, phi):
    """arXiv 2305.08891, eq. 15 and 16."""
    pulled = guided * c.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    return phi * pulled + (1 - phi) * guided


def ddim(
    sampler, network, seed, index, label, w=1.0, interval=(0, 1000), phi=0.0, guide=None, s=0.0, target=0, rederive=True
):
    """One sample, DDIM eq. 12 with ε of arXiv 2207.12598 eq. 6, or arXiv 2105.05233 algorithm 2."""
    m = sampler.bundle.manifest
    ts = sampler.plan("ddim", STEPS)["t"]
    bars = [*m.schedule.alpha_bar[ts.astype(int)], 1.0]
    x = torch.from_numpy(noise.normals(seed, index, noise.START, 0, 64).reshape(1, 1, 8, 8))
    for i, t in enumerate(ts):
        A, B = bars[i], bars[i + 1]
        told, one = torch.full((1,), float(t)), torch.tensor([label])
        with torch.no_grad():
            c, u = network(x, told, one), network(x, told, torch.tensor([10]))
        inside = interval[0] <= t <= interval[1]
        eps = rescaled(u + w * (c - u), c, phi) if inside else c
        if guide is not None and inside:
            state = x.clone().requires_grad_(True)
            chosen = guide(state, told).log_softmax(1)[0, target]
            eps = eps - s * np.sqrt(1 - A) * torch.autograd.grad(chosen, state)[0]
        x0 = ((x - np.sqrt(1 - A) * eps) / np.sqrt(A)).clamp(-1, 1)
        if rederive and (not 0 <= w <= 1 or s):
            eps = (x - np.sqrt(A) * x0) / np.sqrt(1 - A)
        x = np.sqrt(B) * x0 + np.sqrt(1 - B) * eps
    return x.float().numpy()[0]


class TestClassifierFree:
    def test_weight_and_label_are_each_samples_own(self, sampler, network):
        weights, labels = [1.0, 4.0, 0.0, 2.5], [3, 3, 7, 8]
        mine = sampler.sample(seed=5, steps=STEPS, labels=labels, guidance=weights)
        for i, (w, label) in enumerate(zip(weights, labels, strict=True)):
            np.testing.assert_allclose(mine[i], ddim(sampler, network, 5, i, label, w), **TOLERANCE)

    def test_epsilon_is_the_networks_own_where_that_is_asked_for(self, sampler, network):
        mine = sampler.sample(seed=5, steps=STEPS, labels=[3, 4], guidance=[4.0, 1.0], rederive=False)
        for i, (w, label) in enumerate([(4.0, 3), (1.0, 4)]):
            truth = ddim(sampler, network, 5, i, label, w, rederive=False)
            np.testing.assert_allclose(mine[i], truth, **TOLERANCE)
        other = sampler.sample(seed=5, steps=STEPS, labels=[3, 4], guidance=[4.0, 1.0])
        assert np.abs(mine[0] - other[0]).max() > 0.01
        np.testing.assert_array_equal(mine[1], other[1])

    def test_an_interval_guides_some_rows_alone(self, sampler, network):
        mine = sampler.sample(seed=7, steps=STEPS, labels=[5, 6], guidance=3.0, guidance_interval=(30, 70))
        for i, label in enumerate([5, 6]):
            truth = ddim(sampler, network, 7, i, label, 3.0, (30, 70))
            np.testing.assert_allclose(mine[i], truth, **TOLERANCE)
        whole = sampler.sample(seed=7, steps=STEPS, labels=[5, 6], guidance=3.0)
        assert np.abs(whole - mine).max() > 0.05

    def test_rescale_is_the_papers(self, sampler, network):
        mine = sampler.sample(seed=8, steps=STEPS, labels=[5, 6], guidance=4.0, guidance_rescale=0.7)
        for i, label in enumerate([5, 6]):
            np.testing.assert_allclose(mine[i], ddim(sampler, network, 8, i, label, 4.0, phi=0.7), **TOLERANCE)


class TestClassifier:
    def test_it_is_the_papers_gradient(self, sampler, network):
        guide, weights, targets = judge(seed=6), [0.0, 2.0, 6.0], [1, 2, 9]
        mine = sampler.sample(seed=5, steps=STEPS, labels=3, classifier=weights, targets=targets)
        for i, (s, target) in enumerate(zip(weights, targets, strict=True)):
            truth = ddim(sampler, network, 5, i, 3, guide=guide, s=s, target=target)
            np.testing.assert_allclose(mine[i], truth, **TOLERANCE)
        np.testing.assert_allclose(mine[0], sampler.sample(1, seed=5, steps=STEPS, labels=3)[0], rtol=0, atol=1e-5)
        assert np.abs(mine[2] - sampler.sample(3, seed=5, steps=STEPS, labels=3, rederive=True)[2]).max() > 0.02

    def test_an_interval_holds_for_it_too(self, sampler, network):
        mine = sampler.sample(1, seed=5, steps=STEPS, labels=3, classifier=5.0, guidance_interval=(0, 50))
        truth = ddim(sampler, network, 5, 0, 3, interval=(0, 50), guide=judge(seed=6), s=5.0, target=3)
        np.testing.assert_allclose(mine[0], truth, **TOLERANCE)
