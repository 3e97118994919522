"""The fast CPU packer against core.mxfp4, byte for byte, on everything a BF16 block can hold."""

import re

import pytest
import torch
from torch import Tensor

from convert.pack import fast_decode, fast_encode, same_bits
from core.errors import FormatError
from core.mxfp4 import Packed, ScaleRule, decode, encode

RULES = list(ScaleRule)


def every_value_in_every_scale() -> Tensor:
    """All finite BF16 bit patterns, in blocks led by a maximum of every exponent."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    bits = bits[torch.isfinite(bits)]
    return bits[torch.randperm(bits.numel(), generator=torch.Generator().manual_seed(0))][: bits.numel() // 32 * 32]


def cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {
        "all bit patterns": every_value_in_every_scale().reshape(-1, 32),
        "sorted by magnitude": every_value_in_every_scale().sort().values.reshape(-1, 64),
        "zeros": torch.zeros(3, 32),
        "negative zeros": -torch.zeros(3, 32),
        "one block": torch.randn(32, generator=generator),
        "more than one tile": torch.randn(9000, 32, generator=generator),
        "three dimensions": torch.randn(3, 5, 96, generator=generator),
        "tiny": torch.randn(64, 64, generator=generator) * 2.0**-126,
        "huge": torch.randn(64, 64, generator=generator).clamp(-3, 3) * 2.0**124,
        "no rows": torch.randn(0, 32),
    }
    return {name: tensor.to(torch.bfloat16) for name, tensor in found.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", list(cases()))
def test_bytes_and_values_are_the_definitions(name: str, rule: ScaleRule) -> None:
    weight = cases()[name]
    wanted = encode(weight, rule)
    found = fast_encode(weight, rule)
    assert torch.equal(found.scales, wanted.scales) and torch.equal(found.codes, wanted.codes)
    try:
        value = decode(wanted)
    except FormatError as error:
        with pytest.raises(FormatError, match=re.escape(str(error))):
            fast_decode(wanted)
        return
    assert same_bits(fast_decode(wanted), value)


def test_every_byte_pair_decodes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(252, 1).reshape(-1, 16)
    scales = torch.arange(252, dtype=torch.uint8).repeat_interleave(16).unsqueeze(1)
    assert same_bits(fast_decode(Packed(codes, scales)), decode(Packed(codes, scales)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_named(value: float) -> None:
    weight = torch.zeros(40, 64, dtype=torch.bfloat16)
    weight[33, 40] = value
    with pytest.raises(FormatError, match=r"w has a NaN or Inf in block \(33, 1\)"):
        fast_encode(weight, name="w")


def test_damage_is_named() -> None:
    packed = encode(torch.randn(4, 64))
    bad = packed.scales.clone()
    bad[1, 1] = 255
    with pytest.raises(FormatError, match="0xFF"):
        fast_decode(Packed(packed.codes, bad))
    with pytest.raises(FormatError, match="do not describe one tensor"):
        fast_decode(Packed(packed.codes, packed.scales[:, :1]))
    with pytest.raises(FormatError, match="multiple of the MXFP4 block"):
        fast_encode(torch.randn(4, 33))
