"""A decoder as an ONNX graph with its weights beside it: types, places of the weights, operators, the graph itself."""
