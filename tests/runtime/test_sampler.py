"""epsrt.sampler: the same samples however they are asked for, and what it refuses."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from epsrt import EpsrtError, InputError, Plan, Sampler, noise, to_images

STEPS = 8


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def ten(engine):
    """What the tests compare with: ten DDPM samples of seed 5, one a class."""
    return Sampler(engine).sample(10, method="ddpm", steps=STEPS, seed=5, labels=range(10), batch=5)


def test_samples_are_float32_images_in_range(ten):
    assert ten.shape == (10, 1, 8, 8)
    assert ten.dtype == np.float32
    assert np.abs(ten).max() <= 1 + 1e-6
    assert 0.2 < ten.std() < 1
    assert len(np.unique(ten.reshape(10, -1), axis=0)) == 10


def test_ddim_of_our_own_networks_derives_eps_anew(sampler):
    """Where the network's own ε keeps what the clip takes from x0, images get worse with steps."""
    default, anew, own = (sampler.plan("ddim", STEPS, **o).table for o in ({}, {"rederive": True}, {"rederive": False}))
    np.testing.assert_array_equal(default, anew)
    assert not np.array_equal(default, own)


@pytest.mark.parametrize("batch", [None, 1, 2, 3, 8])
def test_batches_do_not_matter(sampler, ten, batch):
    close(sampler.sample(10, method="ddpm", steps=STEPS, seed=5, labels=range(10), batch=batch), ten)


def test_the_same_call_gives_the_same_bits(sampler, ten):
    again = sampler.sample(10, method="ddpm", steps=STEPS, seed=5, labels=range(10), batch=5)
    np.testing.assert_array_equal(again, ten)


def test_first_continues_a_run(sampler, ten):
    rest = sampler.sample(4, method="ddpm", steps=STEPS, seed=5, first=6, labels=range(6, 10))
    close(rest, ten[6:])


def test_seeds_are_samples_of_index_first(sampler):
    seeds = [9, 2**64 - 1, 0, 9]
    mine = sampler.sample(seeds=seeds, method="ddpm", steps=STEPS, first=3)
    for i, seed in enumerate(seeds):
        close(mine[i], sampler.sample(1, seed=seed, method="ddpm", steps=STEPS, first=3)[0])
    np.testing.assert_array_equal(mine[0], mine[3])
    assert np.abs(mine[0] - mine[1]).max() > 0.1
    close(sampler.sample(seeds=np.array([9, 0], np.uint64), method="ddpm", steps=STEPS, first=3), mine[[0, 2]])


def test_labels_one_for_all_a_list_or_none(sampler):
    options = {"steps": STEPS, "seed": 2}
    close(sampler.sample(3, labels=4, **options), sampler.sample(3, labels=[4, 4, 4], **options))
    close(sampler.sample(3, **options), sampler.sample(3, labels=[None, None, None], **options))
    close(sampler.sample(labels=np.array([1, 2]), **options), sampler.sample(2, labels=range(1, 3), **options))
    a, b, none = (sampler.sample(1, labels=label, **options) for label in (1, 2, None))
    assert min(np.abs(a - b).max(), np.abs(a - none).max()) > 1e-2


def test_n_is_implied_or_one(sampler, plain_sampler):
    assert len(sampler.sample(steps=2)) == 1
    assert len(sampler.sample(steps=2, labels=range(3))) == 3
    assert len(sampler.sample(steps=2, seeds=[1, 2])) == 2
    assert len(sampler.sample(steps=2, seeds=[1, 2], labels=[3, 4])) == 2
    assert plain_sampler.sample(np.int64(2), steps=2).shape == (2, 3, 8, 8)


def test_a_plan_is_what_the_method_makes(sampler):
    plan = sampler.plan("ddim", STEPS, eta=0.5, spacing="linspace")
    mine = sampler.sample(2, plan=plan, seed=1)
    np.testing.assert_array_equal(mine, sampler.sample(2, steps=STEPS, eta=0.5, spacing="linspace", seed=1))
    assert np.abs(mine - sampler.sample(2, steps=STEPS, seed=1)).max() > 1e-2


def test_plans_clip_to_the_value_range_unless_told(sampler):
    assert (sampler.plan()["clip"] == 1).all()
    assert len(sampler.plan()) == 50
    assert (sampler.plan(clip=None)["clip"] > 1e20).all()
    assert sampler.plan(timesteps=[5, 0])["t"].tolist() == [5, 0]


def test_a_plan_of_ones_own_runs(sampler):
    plan = Plan.of("half the start", start=(0.0, 0.5), t=0.0, a=1.0)
    z = noise.normals(6, np.arange(2), noise.START, 0, 64).reshape(2, 1, 8, 8)
    np.testing.assert_array_equal(sampler.sample(2, plan=plan, seed=6), z / 2)


def test_defaults_are_ddim_50_and_seed_0(plain_sampler):
    mine = plain_sampler.sample(2)
    np.testing.assert_array_equal(mine, plain_sampler.sample(2, method="ddim", steps=50, seed=0, first=0, eta=0.0))


def test_precisions_nearly_agree(bundle_path, sampler):
    with Sampler.open(bundle_path, precision="fp16", threads=1) as half:
        options = {"method": "ddpm", "steps": STEPS, "labels": range(4)}
        a, b = half.sample(**options), sampler.sample(**options)
    assert 0 < np.abs(a - b).max() < 0.1


class TestStream:
    @pytest.mark.parametrize(("every", "count"), [(1, 8), (3, 3), (8, 1), (100, 1)])
    def test_yields_every_so_many_rows_and_ends_with_the_samples(self, sampler, every, count):
        options = {"method": "ddpm", "steps": STEPS, "seed": 3, "labels": [1, 2, 3]}
        previews = list(sampler.stream(**options, every=every))
        assert len(previews) == count
        assert all(p.shape == (3, 1, 8, 8) and p.dtype == np.float32 for p in previews)
        np.testing.assert_array_equal(previews[-1], sampler.sample(**options))
        assert all(np.abs(p).max() <= 1 for p in previews[:-1])  # estimates of x0, clipped; not noise

    def test_more_than_a_batch_at_once(self, sampler):
        options = {"steps": STEPS, "seed": 3, "labels": range(5)}
        previews = list(sampler.stream(**options, batch=2))
        assert previews[0].shape == (5, 1, 8, 8)
        close(previews[-1], sampler.sample(**options))

    def test_can_be_left_early(self, sampler):
        stream = sampler.stream(2, steps=STEPS, seed=3)
        first = next(stream)
        stream.close()
        np.testing.assert_array_equal(first, next(sampler.stream(2, steps=STEPS, seed=3)))

    def test_refuses_before_the_first_step(self, sampler):
        with pytest.raises(EpsrtError, match="every = 0"):
            sampler.stream(1, every=0)
        with pytest.raises(EpsrtError, match="n = 0"):
            sampler.stream(0)


class TestOnStep:
    def test_counts_rows_of_all_batches(self, sampler):
        seen = []
        sampler.sample(5, steps=STEPS, batch=2, on_step=lambda done, total: seen.append((done, total)))
        assert seen == [(i + 1, 3 * STEPS) for i in range(3 * STEPS)]

    def test_every(self, sampler):
        seen = []
        sampler.sample(3, steps=STEPS, batch=2, every=3, on_step=lambda done, total: seen.append(done))
        assert seen == [3, 6, 8, 11, 14, 16]

    def test_does_not_change_the_samples(self, sampler, ten):
        options = {"method": "ddpm", "steps": STEPS, "seed": 5, "labels": range(10), "batch": 5}
        np.testing.assert_array_equal(sampler.sample(10, **options, every=3, on_step=lambda done, total: None), ten)

    def test_false_stops_with_the_x0_estimates_of_samples_in_work(self, sampler):
        seen = []

        def stop(done, total):
            seen.append(done)
            return done < 3

        options = {"steps": STEPS, "seed": 3, "labels": [1, 2]}
        stopped = sampler.sample(**options, on_step=stop)
        assert seen == [1, 2, 3]
        previews = list(sampler.stream(**options))
        np.testing.assert_array_equal(stopped, previews[2])

    def test_false_in_a_later_batch_keeps_the_finished_samples(self, sampler):
        options = {"steps": STEPS, "seed": 3, "batch": 2}
        whole = sampler.sample(6, **options)
        stopped = sampler.sample(6, **options, on_step=lambda done, total: done < STEPS + 2)
        assert len(stopped) == 4
        np.testing.assert_array_equal(stopped[:2], whole[:2])
        assert np.abs(stopped[2:] - whole[2:4]).max() > 1e-3

    @pytest.mark.parametrize(("at", "count"), [(STEPS, 2), (2 * STEPS, 4), (3 * STEPS, 6)])
    def test_false_at_the_end_of_a_batch_gives_whole_samples(self, sampler, at, count):
        options = {"steps": STEPS, "seed": 3, "batch": 2}
        stopped = sampler.sample(6, **options, on_step=lambda done, total: done < at)
        np.testing.assert_array_equal(stopped, sampler.sample(6, **options)[:count])

    @pytest.mark.parametrize("value", [None, 0, True])
    def test_only_false_stops(self, sampler, value):
        assert len(sampler.sample(4, steps=2, batch=2, on_step=lambda done, total: value)) == 4

    def test_an_error_in_it_reaches_the_caller_and_spoils_nothing(self, sampler):
        def fail(done, total):
            raise KeyError("mine")

        before = sampler.sample(2, steps=STEPS, seed=1)
        with pytest.raises(KeyError, match="mine"):
            sampler.sample(2, steps=STEPS, seed=9, on_step=fail)
        np.testing.assert_array_equal(sampler.sample(2, steps=STEPS, seed=1), before)


def test_two_threads_at_once_equal_serial_results_bitwise(sampler):
    requests = [{"method": m, "seed": s, "labels": [s, 1, 2]} for s in range(4) for m in ("ddpm", "ddim")]
    serial = [sampler.sample(steps=STEPS, **r) for r in requests]
    with ThreadPoolExecutor(2) as pool:
        parallel = list(pool.map(lambda r: sampler.sample(steps=STEPS, **r), requests))
    for a, b in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lanes_are_kept_for_the_next_call(sampler):
    sampler.sample(3, steps=2)
    (kept,) = sampler._pool.free["", 3, (8, 8)]
    sampler.sample(3, steps=2, seed=1)
    assert sampler._pool.free["", 3, (8, 8)] == [kept]


def test_closing_closes_the_lanes_and_the_engine(plain_bundle_path):
    with Sampler.open(plain_bundle_path, "onnxruntime", threads=1) as opened:
        opened.sample(2, steps=2)
        (lanes,) = opened._pool.free["", 2, (8, 8)]
    assert not opened._pool.free
    assert not lanes._runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n = 0: ask for at least 1 sample"),
        ({"n": -1}, "n = -1: ask for at least 1"),
        ({"n": 2.0}, "n = 2.0: ask for at least 1"),
        ({"n": True}, "n = True: ask for at least 1"),
        ({"labels": []}, "n = 0: ask for at least 1"),
        ({"n": 3, "labels": [1, 2]}, "2 labels for 3 samples: give one each"),
        ({"n": 3, "seeds": [1]}, "1 seeds for 3 samples: give one each"),
        ({"seeds": [1, 2], "labels": [1, 2, 3]}, "3 labels for 2 samples: give one each"),
        ({"seed": -1}, r"seed -1 is outside 0 … 2\^64 − 1"),
        ({"seed": 2**64}, "seed 18446744073709551616 is outside"),
        ({"seed": 1.5}, "seed = 1.5 is not a whole number"),
        ({"seed": True}, "seed = True is not a whole number"),
        ({"seeds": [1, -1]}, "seed -1 is outside"),
        ({"seeds": [1, 2**64]}, "seed 18446744073709551616 is outside"),
        ({"seeds": [1, 2.5]}, "seed 2.5 is not an integer"),
        ({"seeds": ["7"]}, "seed '7' is not an integer"),
        ({"first": -1}, "sample index -1 is outside"),
        ({"first": 2**32 - 1, "n": 2}, "sample index 4294967296 is outside"),
        ({"first": 0.5}, "first = 0.5 is not a whole number"),
        ({"every": 0, "on_step": print}, "every = 0: give at least 1"),
        ({"batch": 0}, "batch = 0 is outside 1 … 8, the bundle's largest"),
        ({"batch": 9}, "batch = 9 is outside 1 … 8"),
        ({"steps": 0}, "steps = 0 is outside 1 … 100"),
        ({"steps": 101}, "steps = 101 is outside 1 … 100"),
        ({"method": "eular"}, "method 'eular' is unknown"),
        ({"labels": 11}, "label 11 is outside 0 … 9"),
        ({"labels": [0, -1]}, "label -1 is outside 0 … 9"),
        ({"labels": 1.5}, "label 1.5 is outside"),
        ({"labels": "3"}, "label '3' is outside"),
        ({"churn": 1.0}, "ddim takes no option 'churn'"),
        ({"eta": 2.0}, "eta = 2.0 is outside"),
    ],
)
@pytest.mark.parametrize("call", ["sample", "stream"])
def test_refusals_name_the_value(sampler, arguments, message, call):
    if call == "stream" and "on_step" in arguments:
        arguments = {"every": 0}
    with pytest.raises(EpsrtError, match=message):
        getattr(sampler, call)(**{"steps": 2} | arguments)


def test_options_beside_a_plan_are_refused(sampler):
    with pytest.raises(EpsrtError, match="eta was given beside a plan, which has settled it"):
        sampler.sample(1, plan=sampler.plan(), eta=0.5)


def test_plans_that_need_another_graph_find_it_or_are_refused(sampler, plain_sampler):
    plan = Plan.of("guided", t=0.0, a=1.0, h=[-0.1, -0.1], w=3.0)
    assert np.abs(sampler.sample(1, plan=plan, labels=3) - sampler.sample(1, plan=plan)).max() > 0.01
    with pytest.raises(EpsrtError, match="plain.epsrt has no null label"):
        plain_sampler.sample(1, plan=plan)


def test_labels_of_an_unconditional_bundle_are_refused(plain_sampler):
    with pytest.raises(InputError, match="label 0 was given, but plain.epsrt is unconditional"):
        plain_sampler.sample(2, labels=[0, 1])


class TestToImages:
    def test_values(self):
        samples = np.array([-1, -0.5, 0, 1, -2, 5, 2 / 255 - 1, 2.9 / 255 - 1], np.float32).reshape(1, 1, 2, 4)
        images = to_images(samples)
        assert images.dtype == np.uint8
        assert images.shape == (1, 2, 4, 1)
        assert images.ravel().tolist() == [0, 64, 128, 255, 0, 255, 1, 1]
        assert images.flags.c_contiguous

    def test_value_range_and_channel_order(self, plain_sampler):
        samples = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
        images = to_images(samples, (0.0, 255.0))
        assert images.shape == (2, 2, 2, 3)
        np.testing.assert_array_equal(images, samples.transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(plain_sampler.to_images(samples), to_images(samples, (-1.0, 1.0)))

    @pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 1, 8, 8)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(EpsrtError, match=r"to_images takes \[n, C, H, W\], not \["):
            to_images(np.zeros(shape, np.float32))


@pytest.fixture(scope="module")
def sized(sized_bundle_path):
    with Sampler.open(sized_bundle_path, "onnxruntime", threads=1) as opened:
        yield opened


class TestSizes:
    """[1, 8, 8], and multiples of 4 up to 24."""

    def test_the_noise_of_another_size_is_that_sizes_own(self, sized):
        """By the element's place in the flat [C, H, W]: the same numbers, another picture."""
        start = Plan.of("start", a=1.0, clip=1e30)
        tall, wide = (sized.sample(plan=start, seed=3, size=size) for size in ((12, 4), (4, 12)))
        drawn = noise.normals(3, 0, noise.START, 0, 48)
        np.testing.assert_array_equal(tall.ravel(), drawn)
        np.testing.assert_array_equal(wide.ravel(), drawn)
        own = sized.sample(plan=start, seed=3)
        assert own.shape == (1, 1, 8, 8)
        np.testing.assert_array_equal(own.ravel()[:48], drawn)

    @pytest.mark.parametrize("batch", [1, 2, 4])
    def test_batches_do_not_matter(self, sized, batch):
        options = {"method": "ddpm", "steps": STEPS, "seed": 5, "size": (12, 20)}
        close(sized.sample(5, batch=batch, **options), sized.sample(5, **options))

    def test_a_stream_ends_with_the_samples(self, sized):
        options = {"steps": STEPS, "seed": 2, "size": (20, 8)}
        *estimates, last = sized.stream(6, every=3, **options)
        assert [e.shape for e in estimates] == [(6, 1, 20, 8)] * 2
        close(last, sized.sample(6, **options))

    def test_lanes_are_kept_by_size(self, sized):
        for size in ((8, 8), (8, 12), (12, 8)):
            sized.sample(3, steps=2, size=size)
        kept = {key[1:]: list(lanes) for key, lanes in sized._pool.free.items()}
        assert [kept[3, size][0].shape for size in ((8, 8), (8, 12), (12, 8))] == [(1, 8, 8), (1, 8, 12), (1, 12, 8)]
        sized.sample(3, steps=2, size=(12, 8))
        assert sized._pool.free["", 3, (12, 8)] == kept[3, (12, 8)]
        for batch in (1, 2, 3, 4):
            for size in ((4, 4), (4, 8), (8, 8)):
                sized.sample(batch, steps=1, size=size)
        left = {key[1:] for key, lanes in sized._pool.free.items() if lanes}
        assert (sum(map(len, sized._pool.free.values())), (3, (12, 8)) in left, (4, (8, 8)) in left) == (8, False, True)

    def test_init_decides_the_size(self, sized):
        images = sized.sample(2, steps=STEPS, seed=1, size=(4, 16))
        latents = sized.sample(method="ddim-inversion", steps=STEPS, init=images)
        assert latents.shape == images.shape
        np.testing.assert_array_equal(
            sized.sample(method="ddim-inversion", steps=STEPS, init=images, size=(4, 16)), latents
        )
        with pytest.raises(EpsrtError, match=r"init is float32 \[2, 1, 4, 16\], not float \[2, 1, 8, 8\]"):
            sized.sample(method="ddim-inversion", steps=STEPS, init=images, size=(8, 8))
        with pytest.raises(EpsrtError, match="a size of 4 × 15 is none of sized.epsrt"):
            sized.sample(method="ddim-inversion", steps=STEPS, init=images[..., :15])

    @pytest.mark.parametrize("size", [(8, 10), (28, 8), (0, 8), (-4, 8)])
    def test_sizes_that_the_bundle_lacks_are_refused(self, sized, size):
        message = rf"size of {size[0]} × {size[1]} is none of sized.epsrt: height and width are multiples of 4 up to 24"
        for function in (sized.sample, sized.stream):
            with pytest.raises(EpsrtError, match=message):
                function(2, size=size)

    @pytest.mark.parametrize("size", [(8,), (8, 8, 8), (8.0, 8), (True, 8), ("8", 8)])
    def test_what_is_no_size_is_refused(self, sized, size):
        with pytest.raises(EpsrtError, match=r"is not \(height, width\), two whole numbers of pixels"):
            sized.sample(2, size=size)

    def test_bundles_without_sizes_have_one(self, plain_sampler):
        message = "a size of 8 × 16 is not 8 × 8, the one that plain.epsrt has: export it with sizes for others"
        with pytest.raises(EpsrtError, match=message):
            plain_sampler.sample(2, size=(8, 16))
        assert plain_sampler.sample(1, steps=1, size=(8, 8)).shape == (1, 3, 8, 8)

    def test_memory_is_counted_by_the_size(self, sized):
        sized.sample(1, steps=1, size=(24, 24))
        n = (64 << 30) // (4 * 64 + 512) - 1  # fits at 8 × 8
        with pytest.raises(EpsrtError, match=r"samples at once take \d+ GiB"):
            sized.sample(n, steps=1, size=(24, 24))
