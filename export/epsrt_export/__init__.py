"""epsrt_export: PyTorch networks to bundles. The only stage that knows both torch and ONNX."""

from epsrt_export.autoencoder import Autoencoder
from epsrt_export.export import export, export_network
from epsrt_export.parity import LeftOutWarning, ParityError
from epsrt_export.source import NoisedClassifier, Source

__all__ = ["Autoencoder", "LeftOutWarning", "NoisedClassifier", "ParityError", "Source", "export", "export_network"]
