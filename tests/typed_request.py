"""What an editor says of keywords: mypy checks this file, and an ignore that hides no error is itself an error."""

import threading

from epsrt import Bundle, Plan, Request, Sampler, solvers
from epsrt.schedule import Schedule


def right(sampler: Sampler, bundle: Bundle, plan: Plan) -> None:
    sampler.sample(
        4, method="ddim", steps=50, labels=[1, None], eta=0.5, guidance=[1.0, 2.0], spacing="karras", rho=5.0
    )
    sampler.sample(Request(4, plan=plan, seeds=range(4)), batch=2, every=5)
    next(sampler.stream(2, steps=5, labels=3))
    _ = sampler.sample_async(4, steps=50, batch=2, every=5, deadline=3.0, cancel=threading.Event())
    sampler.stream_async(4, steps=50, batch=2)
    sampler.latents(2, seed=1, size=(8, 16))
    Request(4).but(8, seed=1)
    bundle.plan("heun", 10, s_churn=20.0)
    solvers.make("ddim", Schedule(), eta=0.5)


def wrong(sampler: Sampler, bundle: Bundle) -> None:
    sampler.sample(4, stepz=50)  # type: ignore[call-arg]
    sampler.sample(4, steps="50")  # type: ignore[arg-type]
    next(sampler.stream(4, guidanse=2.0))  # type: ignore[call-arg]
    _ = sampler.sample_async(4, stepz=50)  # type: ignore[call-arg]
    sampler.stream_async(4, on_step=print)  # type: ignore[call-arg]
    sampler.sample(4, cancel=True)  # type: ignore[arg-type]
    sampler.invert(Request(4), lables=3)  # type: ignore[call-arg]
    sampler.latents(4, sed=1)  # type: ignore[call-arg]
    Request(4, stepz=50)  # type: ignore[call-arg]
    Request(4).but(stepz=50)  # type: ignore[call-arg]
    bundle.plan("ddim", etta=0.5)  # type: ignore[call-arg]
    solvers.make("ddim", Schedule(), eta="high")  # type: ignore[arg-type]
