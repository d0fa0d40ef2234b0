"""What a rival runs in its own process: a plain loop in PyTorch over the plan's rows, or diffusers' pipeline.

Nothing heavy is imported before it is asked for: the bench's own process imports this module too.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Generator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from epsrt.bench.rivals import Round, Turn, Warm
from epsrt.bench.timing import SETTLE_STEPS, WARM_S, WARM_STEPS, rest
from epsrt.bundle import Bundle
from epsrt.errors import EngineError, InputError
from epsrt.plan import DEFAULTS
from epsrt_command.foreign import needs

if TYPE_CHECKING:
    from torch import Tensor

    from epsrt_export.source import Source

Images = NDArray[np.float32]
Draw = Callable[[int], Images]  # of a number of steps
TERMS = (
    "in_scale",
    "p",
    "q",
    "clip",
    "a",
    "b",
    "h",
    "c",
    "d",
    "r",
    "e",
    "f",
    "o",
    "g",
)  # of a step, as epsrt.plan has it


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rival is: `library` on `device` in `precision`, from `source`, which the bundle was exported from."""

    bundle: str
    source: str
    options: dict[str, Any]
    threads: int | None
    method: str | None
    steps: int | None
    device: str = "cpu"
    library: str = ""
    precision: str = "fp32"
    batch: int = 1


def check(given: dict[str, Any]) -> None:
    """Raise InputError unless the source of a Task is what its bundle was exported from."""
    task = msgspec.convert(given, Task)
    bundle = Bundle.open(task.bundle)
    own, source = bundle.manifest.provenance, _source(task, bundle)
    if source.weights_sha256 != own.source_sha256:
        raise InputError(
            f"--source {task.source} has the SHA-256 {source.weights_sha256[:12]}…, and {bundle.path.name} was "
            f"exported from {own.source}, {own.source_sha256[:12]}…: give that one"
        )


def serve(given: dict[str, Any]) -> Generator[Any, Any, None]:
    """A rival as epsrt.bench.rivals has it."""
    task = msgspec.convert(given, Task)
    if task.library == "torch.compile" and task.device == "cpu":
        os.environ.setdefault(
            "TORCHINDUCTOR_FREEZING", "1"
        )  # weights packed for the processor, as torch's guides advise
    bundle = Bundle.open(task.bundle)
    import torch

    if task.device == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"torch {torch.__version__} sees no GPU")
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # ours have no TF32 in FP32 either
    clock = Clock(torch.cuda.synchronize if task.device == "cuda" else None)
    make = pipeline if task.library == "diffusers" else loop
    draw, steps = make(task, bundle, _source(task, bundle), clock.tick), len(bundle.plan(task.method, task.steps))
    told = yield msgspec.to_builtins(_warm(draw, steps))
    while True:
        made = _round(draw, clock, msgspec.convert(told, Turn))
        rest()  # a thread that spins would take a core from whoever comes next
        told = yield msgspec.to_builtins(made)


class Clock:
    """When each step of a draw began. `wait` returns once the GPU is idle; None: there is none to wait for."""

    def __init__(self, wait: Callable[[], object] | None):
        self._wait, self.begun, self.each = wait, list[float](), wait is None

    def tick(self) -> None:
        """A step begins. It waits for those before where `each` step is to be timed."""
        if self.each and self._wait is not None:
            self._wait()
        self.begun.append(perf_counter())

    def run(self, draw: Draw, steps: int, each: bool) -> tuple[float, list[float]]:
        """Draw. Seconds in all; and of each step, the last with the images' way to the host."""
        self.begun, self.each = [], each
        begin = perf_counter()
        draw(steps)
        end = perf_counter()
        return end - begin, np.diff([*self.begun, end]).tolist()

    @property
    def on_gpu(self) -> bool:
        return self._wait is not None


def _warm(draw: Draw, steps: int) -> Warm:
    few = min(WARM_STEPS, steps)
    if not np.isfinite(draw(few)).all():  # compiles what is to be compiled
        raise EngineError("its images are not finite")
    seconds: list[float] = []
    while sum(seconds) < WARM_S:
        begin = perf_counter()
        draw(few)
        seconds.append(perf_counter() - begin)
    return Warm(statistics.median(seconds) / few, steps)


def _round(draw: Draw, clock: Clock, turn: Turn) -> Round:
    draw(SETTLE_STEPS)
    whole, stepping, each = 0.0, 0.0, list[float]()
    for _ in range(turn.requests):
        seconds, steps = clock.run(draw, turn.steps, each=not clock.on_gpu)
        whole, stepping, each = whole + seconds, stepping + sum(steps), each + steps
    if clock.on_gpu:
        each = clock.run(draw, turn.steps, each=True)[1]
    return Round(stepping / (turn.steps * turn.requests), whole / turn.requests, each)


def loop(task: Task, bundle: Bundle, source: Source, tick: Callable[[], None]) -> Draw:
    """A plan's steps in PyTorch, channels-last, x in FP32: what is zero or off in all rows is left out."""
    import torch

    m, plan = bundle.manifest, bundle.plan(task.method, task.steps)
    if m.thresholding is not None:
        raise InputError("dynamic thresholding is not in a rival's loop")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[task.precision]
    network = source.network.eval().to(task.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels: tuple[Tensor, ...] = ()
    if m.classes:
        label = 0 if m.null_label is None else m.null_label
        labels = (torch.full((task.batch,), label, device=task.device),)
    used = [name for name in TERMS if (plan[name] != DEFAULTS[name]).any()]
    table = torch.tensor(np.stack([plan[name] for name in used], 1), dtype=torch.float32, device=task.device)
    ts = torch.tensor(plan["t"], dtype=torch.float32, device=task.device)
    channels, remembers = m.shape[0], "c" in used

    def step(x: Tensor, memory: Tensor | None, t: Tensor, row: Tensor) -> tuple[Tensor, Tensor | None]:
        k = dict(zip(used, row.unbind(), strict=True))

        def total(**terms: Any) -> Any:
            return sum(k[name] * value for name, value in terms.items() if name in k)

        scaled = k["in_scale"] * x if "in_scale" in k else x
        out = network(scaled.to(dtype), t, *labels).float()
        out, variance = out[:, :channels], out[:, channels:]
        x0 = total(p=x, q=out)
        if "clip" in k:
            x0 = x0.clamp(-k["clip"], k["clip"])
        noise = None
        if "d" in k:
            noise = torch.randn_like(x) * (torch.exp(k["r"] * variance) if "r" in k else 1)
        after = total(a=x, b=x0, h=out, c=memory, d=noise)
        return after, total(e=x, f=x0, o=out, g=memory) if remembers else None

    compiled = task.library == "torch.compile"
    run = step
    if compiled:
        run = torch.compile(step, dynamic=False, mode="max-autotune" if task.device == "cuda" else "default")

    def drawn(steps: int) -> Images:
        shape, layout = (task.batch, *m.shape), torch.channels_last
        x = (plan.start[1] * torch.randn(shape, device=task.device)).contiguous(memory_format=layout)
        memory = torch.zeros_like(x) if remembers else None
        for i in range(steps):
            tick()
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            x, memory = run(x, memory, ts[i].expand(task.batch), table[i])
            if compiled and task.device == "cuda":  # the graph's next replay overwrites what it returned
                x, memory = x.clone(), None if memory is None else memory.clone()
        images: Images = x.cpu().numpy()
        return images

    def draw(steps: int) -> Images:
        with torch.no_grad() if compiled else torch.inference_mode():
            return drawn(steps)

    return draw


def pipeline(task: Task, bundle: Bundle, source: Source, tick: Callable[[], None]) -> Draw:
    """diffusers' DDIMPipeline or DDPMPipeline with the source's own model and scheduler, as they are shipped."""
    import diffusers
    import torch

    method = task.method or bundle.manifest.sampling.method
    model: Any = source.network.model
    if method not in ("ddim", "ddpm"):
        raise InputError(f"diffusers has no pipeline of this network by {method}: ask for ddim or ddpm")
    if not isinstance(model, diffusers.UNet2DModel) or bundle.manifest.classes:
        raise InputError("diffusers' DDIMPipeline and DDPMPipeline take a UNet2DModel without classes")
    word = method.upper()
    scheduler = getattr(diffusers, f"{word}Scheduler").from_config(source.config["scheduler"])
    pipe: Any = getattr(diffusers, f"{word}Pipeline")(unet=model, scheduler=scheduler)
    pipe.to(task.device, torch.float16 if task.precision == "fp16" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_forward_pre_hook(lambda *_: tick())

    def draw(steps: int) -> Images:
        images: Images = pipe(batch_size=task.batch, num_inference_steps=steps, output_type="np").images
        return images

    return draw


def _source(task: Task, bundle: Bundle) -> Source:
    with needs("epsrt bench --rivals", "export"):
        from epsrt_export import families
    return families.load(bundle.manifest.provenance.family, Path(task.source), **task.options)
