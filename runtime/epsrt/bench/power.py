"""A GPU's power by NVML, while steps run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import fmean

from epsrt import machine
from epsrt.engine import Closing
from epsrt.engines import nvidia
from epsrt.errors import EngineError

SETTLE_S = 1.0  # of steps that do not count: most GPUs tell a mean over the latest second
SECONDS = 1.0  # of steps that count
EVERY_S = 0.02


class Meter(Closing):
    """The power of CUDA's device 0. Raises EngineError that says why it is not known."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise EngineError('nvidia-ml-py is missing: pip install nvidia-ml-py, or "epsrt[gpu]"') from error
        self._nvml, gpu = pynvml, nvidia.require_gpu()
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise EngineError(
                f"NVML does not start ({error}): install NVIDIA's driver with its libnvidia-ml"
            ) from error
        try:
            which = machine.first_visible()
            by = pynvml.nvmlDeviceGetHandleByIndex if which.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
            self._gpu = by(int(which) if which.isdecimal() else which)
            name = pynvml.nvmlDeviceGetName(self._gpu)
            if name != gpu.name:
                raise EngineError(
                    f"NVML's GPU {which} is {name}, CUDA's is {gpu.name}: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
                )
            self.watts()
        except pynvml.NVMLError as error:
            self.close()
            raise EngineError(f"NVML does not tell this GPU's power ({error})") from error
        except BaseException:
            self.close()
            raise

    def watts(self) -> float:
        """Now, or the mean over the latest second: it depends on the GPU."""
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._gpu)) / 1e3

    def mean(self, work: Callable[[], object]) -> float:
        """Watts while `work` is done over and over, for SETTLE_S + SECONDS. Raises EngineError where NVML fails."""
        end = time.perf_counter() + SETTLE_S + SECONDS
        read: list[float] = []
        failed: list[str] = []
        over = threading.Event()

        def sample() -> None:
            over.wait(SETTLE_S)
            try:
                while not over.is_set():
                    read.append(self.watts())
                    over.wait(EVERY_S)
            except self._nvml.NVMLError as error:
                failed.append(f"NVML fails while steps run ({error})")

        reader = threading.Thread(target=sample, daemon=True)
        reader.start()
        try:
            while time.perf_counter() < end or not (read or failed):
                work()
        finally:
            over.set()
            reader.join()
        if failed:
            raise EngineError(failed[0])
        return fmean(read)

    def close(self) -> None:
        self._nvml.nvmlShutdown()
