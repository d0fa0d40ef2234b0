"""Every method through the Sampler: the same as its rows walked in NumPy, and images to begin from."""

import numpy as np
import pytest

from epsrt import EpsrtError, noise
from epsrt.parity.measure import network_outputs
from epsrt.solvers import METHODS

STEPS = 6
OPTIONS = {"ddim": {"eta": 0.5}, "heun": {"s_churn": 2.0}, "euler": {"s_churn": 2.0}, "langevin": {"each": 2}}


def walk(plan, network, seed, label, init=None):
    """The plan's rows, one by one, in float64 but for the network."""
    index, shape = np.arange(len(label)), (len(label), 1, 8, 8)
    z = noise.normals(seed, index, noise.START, 0, 64).reshape(shape)
    x = plan.start[1] * z.astype(np.float64) + (0 if init is None else plan.start[0] * init)
    m = np.zeros_like(x)
    for i in range(len(plan)):
        k = {name: plan[name][i] for name in ("t", "in_scale", "clip", "n", *"pqabhcdefog")}
        out = network((k["in_scale"] * x).astype(np.float32), np.full(len(label), k["t"], np.float32), label)
        x0 = np.clip(k["p"] * x + k["q"] * out, -k["clip"], k["clip"])
        z = noise.normals(seed, index, noise.STEP, int(k["n"]), 64).reshape(shape)
        x, m = (
            k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + k["d"] * z,
            k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m,
        )
    return x


@pytest.fixture
def network(engine):
    """The network alone, by the step graph."""
    return lambda x, t, label: network_outputs(engine, x, t, [{"label": one} for one in label], len(x)).astype(
        np.float64
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ddim-inversion"])
def test_every_method_samples_what_its_rows_say(sampler, network, method):
    options = OPTIONS.get(method, {})
    mine = sampler.sample(method=method, steps=STEPS, seed=4, labels=[3, None, 7], **options)
    truth = walk(sampler.plan(method, STEPS, **options), network, 4, [3, 10, 7])
    np.testing.assert_allclose(mine, truth, rtol=0, atol=1e-4 * max(1, np.abs(truth).max()))


def test_samples_of_different_methods_can_share_a_batch(sampler):
    """One row a sample: DPM-Solver++ in lane 0, Langevin in lane 1, each as it is alone."""
    from epsrt.engines import Sample
    from epsrt.plan import idle_row

    columns = sampler.engine.columns
    plans = [sampler.plan("dpmpp-2m", 4), sampler.plan("langevin", 3, each=2)]
    rows = np.tile(idle_row(columns), (7, 2, 1))
    for lane, plan in enumerate(plans):
        rows[: len(plan), lane] = plan.rows(columns)
    with sampler.engine.lanes(2) as lanes:
        for lane, plan in enumerate(plans):
            lanes.write(lane, Sample(seed=9, index=lane, start=plan.start, conditions={"label": lane}))
        lanes.advance(rows)
        together = [lanes.read(lane) for lane in range(2)]
    for lane, plan in enumerate(plans):
        alone = sampler.sample(1, plan=plan, seed=9, first=lane, labels=lane)[0]
        np.testing.assert_allclose(together[lane], alone, rtol=0, atol=1e-5)


def test_inversion_begins_from_images_and_ddim_leads_back(sampler, network):
    label = [1, 2, 3, 4]
    images = sampler.sample(method="ddim", steps=50, seed=2, labels=label, rederive=False)
    latents = sampler.sample(method="ddim-inversion", steps=50, labels=label, init=images)
    truth = walk(sampler.plan("ddim-inversion", 50), network, 0, label, images)
    np.testing.assert_allclose(latents, truth, rtol=0, atol=1e-3)
    back = sampler.plan("ddim", 50, clip=None)
    again = sampler.sample(plan=back, labels=label, x=latents)
    np.testing.assert_array_equal(sampler.sample(plan=back.cut(0, start=(1.0, 0.0)), labels=label, init=latents), again)
    assert np.abs(again - images).mean() < 0.05
    assert np.abs(latents).std() > 0.5


def test_the_count_may_come_from_the_images(sampler):
    images = np.zeros((3, 1, 8, 8))
    assert sampler.sample(method="ddim-inversion", steps=2, init=images).shape == (3, 1, 8, 8)
    (last,) = sampler.stream(method="ddim-inversion", steps=2, init=images, every=9)
    np.testing.assert_array_equal(last, sampler.sample(method="ddim-inversion", steps=2, init=images))


@pytest.mark.parametrize(
    ("method", "init", "message"),
    [
        ("ddim-inversion", None, "plan 'ddim-inversion' begins from images: give them as init"),
        (
            "ddim",
            np.zeros((2, 1, 8, 8)),
            "plan 'ddim' begins from noise: give strength, 0 to 1, to begin from init noised",
        ),
        ("ddim-inversion", np.zeros((1, 8, 8)), r"init is float64 \[1, 8, 8\], not float \[2, 1, 8, 8\]"),
        ("ddim-inversion", np.zeros((2, 8, 8, 1)), r"init is float64 \[2, 8, 8, 1\], not float"),
        ("ddim-inversion", np.zeros((2, 1, 8, 8), np.uint8), r"init is uint8 .*, not float"),
        ("ddim-inversion", np.full((2, 1, 8, 8), np.nan), "init image 0 holds NaN or infinity"),
        ("ddim-inversion", np.full((2, 1, 8, 8), 1e300), "init image 0 holds NaN or infinity"),
        ("ddim-inversion", np.zeros((3, 1, 8, 8)), "3 init images for 2 samples: give one each"),
    ],
)
def test_init_that_does_not_fit(sampler, method, init, message):
    with pytest.raises(EpsrtError, match=message):
        sampler.sample(2, method=method, steps=2, init=init)


def test_steps_beside_a_plan_are_refused(sampler):
    with pytest.raises(EpsrtError, match="steps was given beside a plan"):
        sampler.sample(1, plan=sampler.plan("ddim", 3), steps=4)


def test_a_plan_clips_to_the_value_range_where_its_method_does(sampler):
    bundle = sampler.bundle
    for method, kind in METHODS.items():
        assert (bundle.plan(method, 5)["clip"].max() == bundle.manifest.clip) == kind.clips
        assert bundle.plan(method, 5, clip=0.5)["clip"].max() == 0.5


def test_ddpm_of_a_learned_variance_uses_it(learned_bundle_path):
    from epsrt import Bundle

    bundle = Bundle.open(learned_bundle_path)
    assert bundle.manifest.variance is not None
    assert bundle.plan("ddpm", 5)["r"].any()
    assert not bundle.plan("ddpm", 5, variance="fixed_large")["r"].any()
    assert not bundle.plan("ddim", 5)["r"].any()


def test_a_graph_without_learned_variance_refuses_it(sampler):
    with pytest.raises(EpsrtError, match="tiny.epsrt has no learned variance"):
        sampler.sample(1, method="ddpm", steps=4, variance="learned_range")
