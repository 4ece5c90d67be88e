"""A decoder as an ONNX graph: the plan of storage types, the layout of the file of weights, and the operators."""
