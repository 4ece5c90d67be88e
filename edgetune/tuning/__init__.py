"""`merge-export --tune`: the storage of every matrix of an int4 ONNX model, chosen by what it was measured to cost."""
