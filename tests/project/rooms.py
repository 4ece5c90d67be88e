"""The map: which room of a package may import which. A room is a folder, or a file, directly in a package.

The order is from the ground floor upwards; a room imports only rooms above it in this list. `edgetune_native` and, from
`edgetune`, all of `edgetune_converters` are open to every room that needs them, and so are the rooms of GROUND.
"""

from __future__ import annotations

GROUND = {"errors", "names", "files"}

CONVERTERS: dict[str, set[str]] = {
    "errors": set(),
    "names": set(),
    "files": {"errors"},
    "gguf": set(),
    "tensors": set(),
    "chat_template": set(),
    "tokenizers": {"gguf", "tensors", "chat_template"},
    "architectures": {"gguf", "tensors"},
    "reading": {"gguf", "tensors", "tokenizers", "architectures"},
    "adapters": {"tensors", "reading"},
    "merging": {"tensors", "architectures", "reading", "adapters"},
    "quantization": {"gguf", "tensors", "architectures", "reading", "merging"},
    "model": {"architectures", "reading", "adapters", "merging", "quantization"},
    "provenance": {"gguf", "tensors", "reading", "adapters", "model"},
    "onnx": {"tensors", "tokenizers", "architectures", "reading", "merging", "quantization"},
    "outputs": {
        *("gguf", "tensors", "tokenizers", "architectures", "reading", "adapters"),
        *("merging", "quantization", "model", "provenance", "onnx"),
    },
    "request": {"gguf", "adapters", "merging", "quantization", "onnx"},
    "inputs": {
        *("gguf", "tokenizers", "reading", "adapters", "merging", "quantization", "model", "provenance", "request"),
    },
    "formats": {
        *("gguf", "tokenizers", "reading", "merging", "quantization", "model"),
        *("provenance", "onnx", "outputs", "request", "inputs"),
    },
    "planning": {"gguf", "merging", "quantization", "model", "onnx", "outputs", "request", "inputs", "formats"},
    "exporting": {
        *("gguf", "merging", "quantization", "model", "provenance", "onnx", "outputs"),
        *("request", "inputs", "formats"),
    },
}

EDGETUNE: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "section": set(),
    "methods": {"section"},
    "objectives": {"section"},
    "config": {"console", "section", "methods", "objectives"},
    "storage_types": {"config"},
    "runs": {"config"},
    "data": {"console", "config", "runs"},
    "reference": {"config", "data", "runs"},
    "runtime": {"console", "data", "runs"},
    "generation": {"console", "data", "runtime"},
    "benchmarking": {"runtime"},
    "chatting": {"console", "data", "runtime", "generation"},
    "validation": {"console", "config", "data", "runs", "reference", "runtime"},
    "planning": {"console", "config", "methods", "objectives", "storage_types", "runs", "data", "validation"},
    "adoption": {"config", "section", "methods", "runs", "data", "planning"},
    "evaluation": {"console", "data", "runs", "runtime", "validation"},
    "serving": {"console", "data", "runs", "runtime", "generation"},
    "sensitivity": {"console", "runs", "reference", "runtime", "validation"},
    "publish": {"objectives", "data", "runs", "validation", "evaluation"},
    "report": {"objectives", "runs", "validation", "evaluation"},
    "inspect": {"data", "runs", "reference", "runtime", "validation"},
    "training": {
        *("console", "config", "methods", "objectives", "runs", "data", "reference", "planning", "runtime"),
        *("validation", "evaluation", "adoption", "benchmarking"),
    },
    "exporting": {
        *("console", "config", "methods", "objectives", "storage_types", "runs", "data", "reference", "runtime"),
        *("validation", "sensitivity", "publish", "planning", "training"),
    },
    "commands": {
        *("console", "config", "storage_types", "runs", "data", "reference", "runtime", "generation", "chatting"),
        *("validation", "planning", "evaluation", "sensitivity", "publish", "report", "inspect", "training"),
        *("exporting", "serving", "benchmarking", "adoption"),
    },
    "cli": {"console", "commands"},
    "__main__": {"cli"},
}

ROOMS = {
    package: {room: others | (GROUND & table.keys() if room not in GROUND else set()) for room, others in table.items()}
    for package, table in (("edgetune_converters", CONVERTERS), ("edgetune", EDGETUNE))
}

# What breaks the map today. A line goes when its code does: a test fails for each line that no import needs any more.
KNOWN_ARROWS: set[tuple[str, str]] = set()
KNOWN_CIRCLES: set[str] = set()  # packages whose parts import each other
KNOWN_LONG_FUNCTIONS: set[str] = set()
KNOWN_LONG_FILES: set[str] = set()
