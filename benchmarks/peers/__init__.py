"""The peers: PyTorch and ONNX Runtime as their best users would write them, a file each."""
