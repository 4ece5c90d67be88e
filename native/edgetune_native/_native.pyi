from ._kernels import Buffer

def open_ggml(path: str, /) -> str: ...
def ggml_types() -> list[tuple[str, int, int, int, bool]]: ...
def quantize(
    rows: Buffer, dtype: int, type_id: int, n: int, k: int, weights: Buffer | None, out: Buffer, threads: int, /
) -> None: ...
def dequantize(blocks: Buffer, type_id: int, n: int, k: int, out: Buffer, threads: int, /) -> None: ...
def add_product(
    rows: Buffer, dtype: int, left: Buffer, right: Buffer, n: int, r: int, k: int, out: Buffer, threads: int, /
) -> None: ...
def compare(
    reference: Buffer,
    reference_dtype: int,
    other: Buffer,
    other_dtype: int,
    targets: Buffer,
    n: int,
    v: int,
    top_k: int,
    outputs: tuple[Buffer, ...],
    threads: int,
    /,
) -> None: ...
def encode_log_probs(
    logits: Buffer, dtype: int, n: int, v: int, scale: Buffer, min_log_prob: Buffer, codes: Buffer, threads: int, /
) -> None: ...
def decode_log_probs(
    scale: Buffer, min_log_prob: Buffer, codes: Buffer, n: int, v: int, out: Buffer, threads: int, /
) -> None: ...
def quantize_blocks(
    rows: Buffer,
    dtype: int,
    n: int,
    k: int,
    weights: Buffer | None,
    bits: int,
    block_size: int,
    symmetric: bool,
    search: bool,
    half_scales: bool,
    codes: Buffer,
    scales: Buffer,
    zero_points: Buffer | None,
    threads: int,
    /,
) -> None: ...
def dequantize_blocks(
    codes: Buffer,
    scales: Buffer,
    half_scales: bool,
    zero_points: Buffer | None,
    bits: int,
    block_size: int,
    n: int,
    k: int,
    out: Buffer,
    threads: int,
    /,
) -> None: ...
def absmax_4bit(rows: Buffer, dtype: int, n: int, k: int, blocksize: int, absmax: Buffer, threads: int, /) -> None: ...
def torch_mean(values: Buffer, count: int, torch_threads: int, /) -> float: ...
def nest_absmax(
    absmax: Buffer,
    count: int,
    offset: float,
    nearest: Buffer,
    blocksize: int,
    codes: Buffer,
    nested_absmax: Buffer,
    threads: int,
    /,
) -> None: ...
def unnest_absmax(
    codes: Buffer,
    count: int,
    quant_map: Buffer,
    nested_absmax: Buffer,
    blocksize: int,
    offset: float,
    absmax: Buffer,
    threads: int,
    /,
) -> None: ...
def quantize_4bit(
    rows: Buffer,
    dtype: int,
    n: int,
    k: int,
    absmax: Buffer,
    blocksize: int,
    values: Buffer,
    packed: Buffer,
    threads: int,
    /,
) -> None: ...
def dequantize_4bit(
    packed: Buffer,
    count: int,
    absmax: Buffer,
    blocksize: int,
    values: Buffer,
    dtype: int,
    out: Buffer,
    threads: int,
    /,
) -> None: ...
def roundtrip_4bit(
    rows: Buffer,
    dtype: int,
    n: int,
    k: int,
    absmax: Buffer,
    scales: Buffer,
    blocksize: int,
    values: Buffer,
    to: int,
    out: Buffer,
    threads: int,
    /,
) -> None: ...
def dequantize_int8(codes: Buffer, scb: Buffer, n: int, k: int, dtype: int, out: Buffer, threads: int, /) -> None: ...
def cpu() -> tuple[str, str, str]: ...
def use_isa(name: str, /) -> None: ...
def probe_amx(force: bool, /) -> tuple[bool, bool, str]: ...
