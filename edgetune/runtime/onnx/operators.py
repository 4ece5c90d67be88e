"""Operators that a graph uses and the installed ONNX Runtime lacks, and the release that has them."""

from __future__ import annotations

from functools import cache
from typing import Any

from edgetune.errors import RuntimeProblem
from edgetune.runtime.onnx.model_file import GraphFile

_STANDARD = ("", "ai.onnx")

# Operators of com.microsoft in exports -> the first release that runs them on the CPU (release notes of ONNX Runtime).
FIRST_RELEASE = {
    "SkipSimplifiedLayerNormalization": "1.14",
    "QuickGelu": "1.14",
    "MatMulNBits": "1.17",
    "RotaryEmbedding": "1.17",
    "GroupQueryAttention": "1.18",
    "GatherBlockQuantized": "1.20",
    "QMoE": "1.23",
}
# ONNX opset -> the first release that implements it
_OPSETS = {19: "1.16", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23"}


def missing_operator(model: GraphFile) -> RuntimeProblem | None:
    """Return an error for the first operator without an implementation, with what to install; None without one."""
    import onnxruntime

    here = f"the installed onnxruntime {onnxruntime.__version__}"
    for domain, name in used_operators(model):
        if (domain, name) not in available_operators():
            release = FIRST_RELEASE.get(name) if domain == "com.microsoft" else None
            return _missing(model, f"the operator {domain or 'ai.onnx'}.{name}, which {here} does not have", release)
    opset = next((entry.version for entry in model.proto.opset_import if entry.domain in _STANDARD), 0)
    if opset > newest_opset():
        return _missing(model, f"operator set {opset}, but {here} has at most {newest_opset()}", _OPSETS.get(opset))
    return None


def _missing(model: GraphFile, what: str, release: str | None) -> RuntimeProblem:
    requirement = f"'onnxruntime>={release}'" if release else "--upgrade onnxruntime"
    return RuntimeProblem(f"{model.path} uses {what}", f"pip install {requirement}")


def used_operators(model: GraphFile) -> list[tuple[str, str]]:
    """Return (domain, name) of every operator, sorted, without the functions that the model defines."""
    own = {(function.domain, function.name) for function in model.proto.functions}
    found = {(_domain(node), node.op_type) for node in model.nodes}
    return sorted(found - own)


def _domain(node: Any) -> str:
    return "" if node.domain in _STANDARD else node.domain


@cache
def available_operators() -> frozenset[tuple[str, str]]:
    """Return (domain, name) of this build's operators; of those in FIRST_RELEASE only those that run on the CPU."""
    known = {(schema.domain, schema.name) for schema in _state().get_all_operator_schema()}
    run = {
        (kernel.domain, kernel.op_name)
        for kernel in _state().get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    elsewhere = {("com.microsoft", name) for name in FIRST_RELEASE} - run
    return frozenset(("" if domain in _STANDARD else domain, name) for domain, name in (known | run) - elsewhere)


@cache
def newest_opset() -> int:
    """Return the newest version of the standard operators in this build."""
    versions = (s.since_version for s in _state().get_all_operator_schema() if s.domain in _STANDARD)
    return int(max(versions))


def _state() -> Any:
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    return state
