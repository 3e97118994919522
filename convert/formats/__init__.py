"""One dialect a file: a key map plus a packer. `FORMATS` is what --to accepts."""

from convert.formats.bf16 import BF16
from convert.formats.compressed_tensors import HF
from convert.formats.gguf import Gguf
from convert.formats.gpt_oss import GptOss
from convert.formats.mimo import MiMo
from convert.formats.quark import Quark
from convert.plan import Format
from convert.source import Source

FORMATS: dict[str, Format] = {f.name: f for f in (HF(), BF16(), MiMo(), GptOss(), Quark(), Gguf())}


def format_named(name: str, source: Source) -> Format:
    """The dialect; `hf` means its native layout for a GPT-OSS model."""
    if name == "hf" and source.config.model_type == "gpt_oss":
        name = "gpt-oss"
    return FORMATS[name]
