"""What each engine does with each format, traps included. Facts with their source; dates matter, so they are given.

State of October 2026, from the loaders' code and their issue threads (numbers: issues or pull requests in the
engine's repository). transformers 5.23 is tested here, llama.cpp (llama-cpp-python 0.3.36) by the slow tests. vLLM and
SGLang are not installed in our CI: their rows say what their code reads, and tests/unit/test_convert_contracts.py holds
our files against that.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    engine: str
    does: str
    trap: str = ""


TABLE: dict[str, tuple[Row, ...]] = {
    "hf": (
        Row("transformers", "loads; experts are decompressed to BF16 (dequantize=True does it at load time)",
            "MiMo-V2 with window KV heads other than twice the full ones (V2.5-Pro) is beyond its class"),
        Row("vLLM", "loads (#31926, #32285)", "serves W4A4 on SM100 and newer although the file says W4A16 (#56770)"),
        Row("SGLang", "loads from CompressedTensorsW4A16Mxfp4MoE on (Marlin)",
            "needs hidden % 128 = 0 and expert width % 64 = 0; older versions: KeyError w2_weight_packed"),
        Row("llama.cpp", "does not read it", "export --to gguf"),
    ),
    "bf16": (
        Row("transformers", "loads", "V2.5-Pro geometry is beyond its MiMo class"),
        Row("vLLM", "loads", "four times the memory of MXFP4"),
        Row("SGLang", "loads", "four times the memory of MXFP4"),
        Row("llama.cpp", "its converter reads it", "converting there requantises; export --to gguf keeps the codes"),
    ),
    "mimo": (
        Row("transformers", "does not read it", "export --to hf"),
        Row("vLLM", "loads since #57784 (fp8 + store_dtype=mxfp4)",
            "older versions take the experts for FP8; 055e47c2 cuts fused QKV by each layer's own KV heads, where "
            "48-layer releases have the full layers' 4 chunks in window layers too"),
        Row("SGLang", "V2.6 models since #40448; #27638 dequantises to block FP8", "else: KeyError w2_weight_scale"),
        Row("llama.cpp", "does not read it", "export --to gguf"),
    ),
    "gpt-oss": (
        Row("transformers", "loads; without a GPU or with an old triton it dequantises to BF16",
            "saving it again there assumes 90 groups of 32 (a width of 2880)"),
        Row("vLLM", "loads, for model_type gpt_oss only"),
        Row("SGLang", "loads"),
        Row("llama.cpp", "its converter repacks it"),
    ),
    "quark": (
        Row("transformers", "needs the quark package; not tested here"),
        Row("vLLM", "loads (quark_moe.py), weight-only accepted"),
        Row("SGLang", "refuses: its loader demands dynamic FP4 inputs"),
        Row("llama.cpp", "does not read it", "export --to gguf"),
    ),
    "gguf": (
        Row("transformers", "does not read MXFP4 GGUF"),
        Row("vLLM", "experimental GGUF support; not tested here"),
        Row("SGLang", "experimental GGUF support; not tested here"),
        Row("llama.cpp", "loads MIMO2, QWEN3MOE and GPT_OSS with the MXFP4 type (39)",
            "older builds lack type 39, or silently ignore MiMo's attention.value_scale; MXFP4 on the CPU rounds "
            "activations to 8 bit; YaRN is computed as truncate=true, GPT-OSS says false"),
    ),
    "drafter, hf": (
        Row("transformers", 'generate(..., assistant_model=…, speculation_type="dflash"), from 5.23',
            "one prompt at a time; a tap at the last layer needs tie_last_hidden_states=false in the target's config"),
        Row("vLLM", "maps its tensor names (encoder.fc, output_norm_enc); not tested here"),
    ),
    "drafter, z-lab": (
        Row("dflash 0.1.0", "loads; tested here where the package is installed"),
        Row("SGLang", "loads (#16818)", "versions that ignore is_causal make sliding layers causal"),
        Row("vLLM", "loads", "adds 1 to target_layer_ids itself"),
    ),
    "drafter, vllm": (
        Row("vLLM", "loads (method dflash, num_speculative_tokens = block_size - 1; #46104)",
            "full and sliding layers together need its V2 runner; fp16 overflows (#55250)"),
    ),
    "drafter, mimo": (
        Row("SGLang", "loads (DFLASH, --speculative-num-draft-tokens = block_size; #40448)", "needs PP=1 on CUDA"),
        Row("vLLM", "loads (#46104), mask_embedding.pt included",
            "its general DFlash class reads no attention_value_scale: look whether your version has MiMo's"),
        Row("transformers", "does not read it", "no sinks, value scale, partial rotary: train without, export --to hf"),
    ),
    "dcp": (
        Row("torch.distributed.checkpoint", "loads at any world size", "its metadata is a pickle: load only your own"),
    ),
}  # fmt: skip


def engine_table(format_name: str) -> str:
    rows = TABLE.get(format_name, ())
    lines = [f"{r.engine:<14}{r.does}" + (f"\n{'':<14}trap: {r.trap}" if r.trap else "") for r in rows]
    return "\n".join(lines)
