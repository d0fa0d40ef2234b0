"""epsrt_export: PyTorch networks to bundles. The only stage that knows both torch and ONNX."""

from epsrt_export.export import export, export_network
from epsrt_export.parity import ParityError

__all__ = ["ParityError", "export", "export_network"]
