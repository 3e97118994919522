"""One dialect a file: a key map plus a packer. `FORMATS` is what --to accepts; `DRAFTERS` with --what drafter."""

from convert.formats.bf16 import BF16
from convert.formats.compressed_tensors import HF
from convert.formats.drafter import Dialect
from convert.formats.drafter_hf import Hf
from convert.formats.drafter_mimo import MiMoDrafter
from convert.formats.drafter_vllm import VLlm
from convert.formats.drafter_zlab import ZLab
from convert.formats.gguf import Gguf
from convert.formats.gpt_oss import GptOss
from convert.formats.mimo import MiMo
from convert.formats.quark import Quark
from convert.plan import Format
from convert.source import Source

FORMATS: dict[str, Format] = {f.name: f for f in (HF(), BF16(), MiMo(), GptOss(), Quark(), Gguf())}
DRAFTERS: dict[str, Dialect] = {d.name: d for d in (Hf(), ZLab(), VLlm(), MiMoDrafter())}


def format_named(name: str, source: Source) -> Format:
    """The dialect; `hf` means its native layout for a GPT-OSS model."""
    if name == "hf" and source.config.model_type == "gpt_oss":
        name = "gpt-oss"
    return FORMATS[name]
