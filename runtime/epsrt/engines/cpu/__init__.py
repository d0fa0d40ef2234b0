"""Engines in the host's memory: onnxruntime and OpenVINO on the CPU."""
