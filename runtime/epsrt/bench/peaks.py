"""What NVIDIA documents that its GPUs can do at most: to say how much of it is achieved."""

from __future__ import annotations

from collections.abc import Iterable

from epsrt.bench.report import Peak

A100, H100, H200 = "NVIDIA's A100 data sheet", "NVIDIA's H100 data sheet", "NVIDIA's H200 data sheet"

# the driver's name -> 10¹² FLOP/s in FP16 and bf16 (tensor cores, dense, sums in FP32) and in FP32 (without TF32), 10⁹
# bytes/s, and where it says so. Data sheets give tensor cores with sparsity, which is twice as much.
DOCUMENTED: dict[str, tuple[float, float, float, str]] = {
    "NVIDIA H100 80GB HBM3": (989, 67, 3350, H100),
    "NVIDIA H100 NVL": (835, 60, 3900, H100),
    "NVIDIA H100 PCIe": (756, 51, 2000, H100),
    "NVIDIA H200": (989, 67, 4800, H200),
    "NVIDIA H200 NVL": (835, 60, 4800, H200),
    "NVIDIA B200": (2250, 75, 8000, "NVIDIA's DGX and HGX B200 data sheets"),
    "NVIDIA A100-SXM4-40GB": (312, 19.5, 1555, A100),
    "NVIDIA A100-SXM4-80GB": (312, 19.5, 2039, A100),
    "NVIDIA A100-PCIE-40GB": (312, 19.5, 1555, A100),
    "NVIDIA A100 80GB PCIe": (312, 19.5, 1935, A100),
    "NVIDIA L4": (121, 30.3, 300, "NVIDIA's L4 data sheet"),
    "NVIDIA L40": (181, 90.5, 864, "NVIDIA's L40 data sheet"),
    "NVIDIA L40S": (362, 91.6, 864, "NVIDIA's L40S data sheet"),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 1008, "NVIDIA's Ada whitepaper"),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, 1792, "NVIDIA's RTX Blackwell whitepaper"),
}


def peak_of(
    device: str, gpu: str, precisions: Iterable[str], tflops: float | None = None, gbs: float | None = None
) -> Peak | None:
    """The peak of a device, "cuda" or "cpu"; None where nobody says it.

    gpu          the name that the driver gives it; a part of one (MIG) has another, and no peak
    tflops, gbs  given by somebody, for all `precisions`: they go before what NVIDIA documents
    """
    half, single, documented, source = DOCUMENTED.get(gpu if device == "cuda" else "", (0.0, 0.0, 0.0, ""))
    most = {"fp16": half, "bf16": half, "fp32": single} if source else {}
    if tflops is not None:
        most = dict.fromkeys(precisions, tflops)
    if tflops is None and gbs is None and not source:
        return None
    given = [word for word, value in (("FLOP/s", tflops), ("bytes/s", gbs)) if value is not None]
    said = [f"{' and '.join(given)} as given"] if given else []
    said += [source] if source and len(given) < 2 else []
    return Peak(device, most, gbs or documented or None, ", ".join(said))
