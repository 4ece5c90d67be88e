"""The storage types of the matrices of an int4 ONNX model, chosen by measured errors."""
