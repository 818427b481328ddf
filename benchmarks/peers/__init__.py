"""The peers: PyTorch and ONNX Runtime programs as an expert would write them, one per file."""
