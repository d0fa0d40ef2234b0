"""Train, export, verify and sample the handwritten digits, end to end: `make demo`.

Everything lands in out/; what is there already and still fits is used again. The judge is an RBF support-vector
machine that saw real digits alone; it says which share of the samples reads as the digit that was asked for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sheet import sheet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from epsrt import Bundle, Sampler, open_engine
from epsrt.engines import runnable
from epsrt.errors import BundleError
from epsrt.files import sha256, whole_file
from epsrt.verify import verify_all
from epsrt_command import show
from epsrt_export import export
from epsrt_trainer.data import load
from epsrt_trainer.presets import PRESETS
from epsrt_trainer.train import train

OUT = Path("out")
CHECKPOINT, BUNDLE, PICTURE = OUT / "digits.safetensors", OUT / "digits.epsrt", OUT / "demo.png"
SEED = 1
RUNS = (("ddpm", 1000, 100), ("ddim", 100, 500), ("ddim", 50, 500), ("ddim", 20, 500), ("ddim", 10, 500))

console = show.out()


@dataclass(frozen=True)
class Run:
    method: str
    steps: int
    images: NDArray[np.uint8]  # [n, 8, 8, 1]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.images) / self.seconds


def trained(name: str = "digits", out: Path = CHECKPOINT) -> Path:
    """The checkpoint of a preset; one that is finished is kept."""
    preset = PRESETS[name]
    with show.progress() as tell:
        return train(
            load("digits"),
            preset.network,
            preset.schedule,
            preset.train,
            out,
            progress=lambda p: tell(f"train {name}, {p.steps} steps", p.step / p.steps),
        )


def exported(checkpoint: Path, out: Path = BUNDLE, classifier: Path | None = None, **options: Any) -> Bundle:
    """The bundle of a checkpoint; one that was made of the same weights is kept. `options` are export's."""
    try:
        bundle = Bundle.open(out)
        made_of = bundle.manifest.provenance.source_sha256, getattr(bundle.manifest.classifier, "source_sha256", None)
        if made_of == (sha256(checkpoint), classifier and sha256(classifier)):
            return bundle
    except BundleError:
        pass
    with show.progress() as tell:
        return export(checkpoint, out, classifier=classifier, on_stage=tell, **options)


def verified(bundle: Bundle) -> None:
    rungs = []
    with show.progress() as tell:
        for precision in dict.fromkeys([*runnable(bundle), open_engine(bundle).precision]):
            report = partial(_report, tell, precision)
            rungs += verify_all(open_engine(bundle, precision=precision), report)
    console.print(show.rung_table(rungs))
    if not all(r.passed for r in rungs):
        raise SystemExit(f"{bundle.path} failed its verification")


def _report(tell: Callable[[str, float], None], precision: str, name: str, fraction: float) -> None:
    tell(f"verify {precision} {name}", fraction)


def sampled(sampler: Sampler, method: str, steps: int, n: int) -> Run:
    """n samples of classes 0 … 9 in turn, from the same seed for every sampler; kept under out/demo/."""
    plan = sampler.plan(method, steps)
    on = f"{sampler.engine.name} {sampler.engine.precision}"
    key = f"{sampler.bundle.manifest.digest} {on} {SEED} {hashlib.sha256(plan.table.tobytes()).hexdigest()}"
    kept = OUT / "demo" / f"{method}-{steps}.npz"
    if kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            if str(file["key"]) == key and len(file["images"]) == n:
                return Run(method, steps, file["images"], float(file["seconds"]))
    name = f"{method}-{steps}, {n} images"
    sampler.sample(min(n, sampler.engine.max_batch), plan=plan.cut(0, 2), labels=0)  # warm-up
    with show.progress() as tell:
        begin = time.perf_counter()
        samples = sampler.sample(
            n,
            plan=plan,
            seed=SEED,
            labels=[i % 10 for i in range(n)],
            on_step=lambda done, total: tell(name, done / total),
            every=max(1, steps // 20),
        )
        seconds = time.perf_counter() - begin
    images = sampler.to_images(samples)
    with whole_file(kept) as beside:
        np.savez(beside, images=images, seconds=seconds, key=key)
    return Run(method, steps, images, seconds)


def judge() -> tuple[SVC, float]:
    """An RBF SVM on real digits (values 0 … 16), and its accuracy on those that it did not see."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    model = SVC(kernel="rbf", C=10, gamma=1e-3).fit(x_train, y_train)
    return model, float(model.score(x_test, y_test))


def accuracy(model: SVC, images: NDArray[np.uint8]) -> float:
    values = np.round(images.reshape(len(images), -1) / 255 * 16)
    return float(np.mean(model.predict(values) == np.arange(len(images)) % 10))


def draw(rows: list[tuple[str, NDArray[np.uint8]]], path: Path, left: int = 110) -> None:
    """The first ten images [n, 8, 8, 1] of each row, beside its name."""
    with whole_file(path) as beside:
        sheet([(name, list(images[:10, ..., 0])) for name, images in rows], left=left, times=7).save(beside)


def main() -> None:
    begin = time.perf_counter()
    bundle = exported(trained())
    verified(bundle)
    model, held_out = judge()
    with Sampler(open_engine(bundle)) as sampler:
        runs = [sampled(sampler, *run) for run in RUNS]
    draw([(f"{run.method.upper()}-{run.steps}", run.images) for run in runs], PICTURE)
    title = f"{BUNDLE} on {sampler.engine.name} {sampler.engine.precision}, seed {SEED}"
    columns = ("sampler", "steps", "images", "seconds", "images/s", "speed-up", "read as asked")
    made = show.table(title, *columns, right=columns[1:])
    for run in runs:
        made.add_row(
            run.method.upper(),
            str(run.steps),
            str(len(run.images)),
            f"{run.seconds:.1f}",
            f"{run.rate:.1f}",
            f"{run.rate / runs[0].rate:.1f} ×",
            f"{accuracy(model, run.images):.1%}",
        )
    console.print(made)
    console.print(f"judge: RBF SVM, {held_out:.1%} on held-out real digits; picture: {PICTURE}")
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
