"""One reader under atheris, in a process that it ends: python tests/trust/fuzzed.py READER FOLDER [OPTION …]

The options are libFuzzer's. It counts the branches of epsrt's own Python that an input runs, and goes on from those
that run new ones.
"""

from __future__ import annotations

import logging
import random
import resource
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["epsrt", "epsrt_trainer"]):
    from trust.targets import TARGETS
    from trust.workers import MEMORY

if __name__ == "__main__":
    _, name, folder, *options = sys.argv
    target, place = TARGETS[name], Path(folder)
    with atheris.instrument_imports(include=["epsrt", "epsrt_trainer"]):  # what a reader imports when it is used
        target.one(target.seeds()[0], place)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)

    def one(data: bytes) -> None:
        target.one(data, place)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = target.mutate(data, rng) if rng.random() < 0.7 else atheris.Mutate(data, most)
        return changed[:most]

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()
