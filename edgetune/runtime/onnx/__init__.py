"""ONNX folders on ONNX Runtime."""
