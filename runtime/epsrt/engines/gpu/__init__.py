"""Engines on an NVIDIA GPU: TensorRT, TensorRT-RTX and onnxruntime on lanes in device memory."""
