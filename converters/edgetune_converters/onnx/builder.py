"""Build a graph: nodes, small constants stored once, and weights as external initializers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgetune_converters.onnx.layout import ExternalArray

CONTRIB = "com.microsoft"
OPSET, IR_VERSION = 23, 11  # the first with RMSNormalization, Attention and RotaryEmbedding

Dimensions = Sequence[int | str]


class Graph:
    """A graph being built, nodes in order of creation. Value names are paths: "/model/layers.0/attn/MatMulNBits"."""

    def __init__(self, data_file: str) -> None:
        self._data_file = data_file
        self._nodes: list[Any] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._shared: dict[str, str] = {}
        self._names: set[str] = set()
        self._place = "/model"
        self._domains: set[str] = set()

    def at(self, place: str) -> None:
        """Name the nodes that follow after this part of the model."""
        self._place = f"/model/{place}" if place else "/model"

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node and return the names of its outputs, given by number or by name ("" for an unused one)."""
        name = self._free(f"{self._place}/{operator}")
        named = [f"{name}/output_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(operator, list(inputs), named, name=name, domain=domain, **attributes))
        self._domains.add(domain)
        return named

    def one(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return its name."""
        return self.add(operator, inputs, 1, domain, **attributes)[0]

    def fused(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append one of ONNX Runtime's own operators with one output and return its name."""
        return self.one(operator, *inputs, domain=CONTRIB, **attributes)

    def named(self, value: str, name: str) -> None:
        """Rename a value to a graph output. No node may read it."""
        node = next(node for node in reversed(self._nodes) if value in node.output)
        assert not any(value in other.input for other in self._nodes)
        node.output[list(node.output).index(value)] = name

    def shared(self, key: str, make: Callable[[], str]) -> str:
        """Return a value that several parts need; `make` creates it the first time."""
        if key not in self._shared:
            place, self._place = self._place, "/model/shared"
            self._shared[key] = make()
            self._place = place
        return self._shared[key]

    def constant(self, values: NDArray[Any]) -> str:
        """Return a small tensor stored in the graph, once for equal contents."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers[name] = numpy_helper.from_array(values, name)
            self._constants[key] = name
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """Return a constant i64 [n]."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        """Return a constant f32 []."""
        return self.constant(np.array(value, np.float32))

    def external(self, array: ExternalArray) -> str:
        """Return the initializer that refers to an array in the file of weights."""
        if array.name not in self._initializers:
            tensor = TensorProto(name=array.name, data_type=array.spec.dtype, dims=array.spec.shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": self._data_file, "offset": array.offset, "length": array.spec.bytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[array.name] = tensor
        return array.name

    def input(self, name: str, dtype: int, shape: Dimensions, default: NDArray[Any] | None = None) -> str:
        """Declare a graph input; one with a default is optional."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        if default is not None:
            self._initializers[name] = numpy_helper.from_array(default, name)
        return name

    def output(self, name: str, dtype: int, shape: Dimensions) -> None:
        """Declare a graph output; a value of this name must exist."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def model(self, producer_version: str) -> ModelProto:
        """Return the model, without metadata and without weights."""
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self._domains) if domain]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="edgetune",
            producer_version=producer_version,
        )

    def _free(self, name: str) -> str:
        found, count = name, 1
        while found in self._names:
            found, count = f"{name}_{count}", count + 1
        self._names.add(found)
        return found
