"""The fast tests: all except those listed here. A new file is fast until it is listed; `pytest --fast` runs them.

A fast test imports no torch, starts no process per case, opens no browser, and takes well under a second.
"""

from __future__ import annotations

from pathlib import Path

TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"}
_TESTS = Path(__file__).parent

NOT_FAST = {
    # torch or transformers: as the subject, as the oracle, or to make the tiny models of tests/converters/tiny.py
    *("cases", "training", "planning", "end_to_end", "samples", "runtime", "validation", "report", "sensitivity"),
    *("evaluation", "serving", "chatting", "benchmarking", "adoption/test_adopt.py"),
    *("commands", "exporting/test_imports.py", "exporting/test_merge_export.py", "exporting/test_traced.py"),
    *(
        "exporting/test_through_peft.py",
        "exporting/test_rehearsal.py",
        "exporting/test_importance.py",
        "exporting/test_run.py",
        "converters/test_request.py",
    ),
    *("converters/onnx", "converters/test_added_tokens.py", "converters/test_converter.py"),
    *(
        "converters/test_score_heads.py",
        "converters/test_soft_prompts.py",
        "converters/test_peft_methods.py",
        "converters/test_folds.py",
    ),
    "converters/test_four_bit_methods.py",
    *("converters/test_background_work.py", "converters/test_export.py", "converters/test_page_cache.py"),
    *("converters/test_families.py", "converters/test_family_options.py", "converters/test_merge_base.py"),
    *("converters/test_mxfp4.py", "converters/test_outputs.py", "converters/test_outputs_of_families.py"),
    *("converters/test_quantized_bases.py", "converters/test_compressed_tensors.py"),
    *("converters/test_metadata_rules.py", "converters/test_other_readers.py", "converters/test_further_kinds.py"),
    *("converters/test_combined_adapters.py", "converters/test_gguf_lora.py", "converters/test_lora_variants.py"),
    *(
        "converters/test_prequantized.py",
        "converters/test_rotation.py",
        "converters/test_further_kinds.py",
        "converters/test_tokenizers.py",
    ),
    *(
        "converters/test_damaged_models.py",
        "converters/test_gguf_base.py",
        "converters/test_gguf_to_transformers.py",
        "converters/test_smollm2.py",
        "converters/test_flagship.py",
    ),
    *(
        "data/test_chat.py",
        "data/test_dataset_info.py",
        "data/test_real_rows.py",
        "data/test_real_templates.py",
        "data/test_sources.py",
        "data/test_objective_fuzz.py",
        "data/test_row_fuzz.py",
        "converters/test_split.py",
        "native/test_bitsandbytes.py",
        "native/test_four_bit.py",
        "publish/test_modelfile.py",
    ),
    *(
        "cases/test_23_leftover_quantization_entry.py",
        "cases/test_29_stops_in_config.py",
        "cases/test_written_tokens.py",
        "cases/test_31_wrapped_adapter_keys.py",
    ),
    # processes
    *("bench", "smoke", "project/test_make_rules.py", "project/test_python_api.py", "native/test_processor.py"),
    *("converters/test_killed.py", "converters/test_memory.py"),
    # tens of seconds: large matrices, and llama.cpp as the oracle
    *("converters/test_overrides.py", "converters/test_recipes.py", "converters/test_architectures.py"),
    *("converters/test_damage.py", "native/test_quantize.py", "native/test_quantize_kernels.py"),
}


def is_fast(path: Path) -> bool:
    """Whether a test file, or a folder with some, is fast."""
    parts = path.relative_to(_TESTS).parts
    return not any("/".join(parts[:length]) in NOT_FAST for length in range(1, len(parts) + 1))
