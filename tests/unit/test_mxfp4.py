"""core.mxfp4 against golden bytes, a brute-force oracle and compressed-tensors' own packer."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from core.errors import FormatError
from core.mxfp4 import E2M1_VALUES, Packed, ScaleRule, decode, encode, on_grid, snap, unpack_codes
from tests.mxfp4_cases import AMAX_BITS, RULES, every_pattern, from_bits, gaussian, golden_cases, same_bits


def oracle(block_QB: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """(codes [Q, 32], scale bytes [Q]) by the definitions: logarithms and a search over all eight magnitudes."""
    x_QB = block_QB.to(torch.float64)
    amax_Q = x_QB.abs().amax(-1)
    mantissa_Q, exponent_Q = torch.frexp(amax_Q)  # amax = mantissa * 2^exponent, mantissa in [.5, 1)
    floor_log2_Q = exponent_Q.to(torch.int64) - 1
    if rule is ScaleRule.even:  # round 2 * mantissa to a multiple of 1/2; 1.75 and more become 2
        e_Q = floor_log2_Q + (torch.floor(4 * mantissa_Q + 0.5) == 4) - 2
    elif rule is ScaleRule.floor:
        e_Q = floor_log2_Q - 2
    else:
        e_Q = floor_log2_Q - 3
        for _ in range(3):
            e_Q += torch.ldexp(torch.full_like(amax_Q, 6.0), e_Q) < amax_Q
    e_Q = torch.where(amax_Q == 0, -127, e_Q).clamp(-127, 127)
    y_QB = torch.ldexp(x_QB.abs(), -e_Q[:, None])
    distance_QBI = (y_QB[..., None] - torch.tensor(E2M1_VALUES, dtype=torch.float64)).abs()
    odd_I = torch.arange(8) % 2
    index_QB = (distance_QBI + odd_I * 2.0**-40).argmin(-1)  # of two equally near, the even index
    return (index_QB + 8 * torch.signbit(block_QB)).to(torch.uint8), (e_Q + 127).to(torch.uint8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_golden_bytes(case: dict, rule: ScaleRule) -> None:
    packed = encode(from_bits(case["bf16_bits"]), rule)
    assert packed.codes.tolist() == case[rule.value]["packed"]
    assert packed.scales.tolist() == [case[rule.value]["scale"]]


@pytest.mark.parametrize("rule", RULES)
def test_every_bf16_pattern_against_the_oracle(rule: ScaleRule) -> None:
    seen = 0
    for amax_bits in AMAX_BITS:
        block_QB = every_pattern(amax_bits)
        packed = encode(block_QB, rule)
        codes, scales = oracle(block_QB, rule)
        assert torch.equal(unpack_codes(packed.codes), codes), hex(amax_bits)
        assert torch.equal(packed.scales.flatten(), scales), hex(amax_bits)
        seen = max(seen, len(block_QB.view(torch.int16).unique()))
    assert seen == 2 * (0x7F5F + 1)


def test_ties_go_to_the_even_code() -> None:
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    block = torch.cat((midpoints, -midpoints, torch.tensor([6.0]), torch.zeros(17)))
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    for rule in RULES:
        snapped = snap(block, rule)
        assert torch.equal(snapped[:7], expected)
        assert same_bits(snapped[7:14], -expected)


def test_signed_zero_and_the_zero_block() -> None:
    block = torch.zeros(64)
    block[1] = block[33] = -0.0
    block[34:36] = torch.tensor([1.0, -0.01])  # rounds to zero in a block of scale 2^-2: the sign stays
    packed = encode(block)
    assert packed.scales[0] == 0
    assert unpack_codes(packed.codes)[:2].tolist() == [0, 8]
    assert unpack_codes(packed.codes)[32:36].tolist() == [0, 8, 6, 8]
    assert torch.signbit(decode(packed)).nonzero().flatten().tolist() == [1, 33, 35]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_tensor_and_block(bad: float) -> None:
    weight = gaussian(4, 96)
    weight[2, 70] = bad
    with pytest.raises(FormatError, match=r"^experts\.7\.down has a NaN or Inf in block \(2, 2\)"):
        encode(weight, name="experts.7.down")


def test_fp32_that_becomes_inf_in_bf16_is_refused() -> None:
    weight = torch.ones(32)
    weight[5] = torch.finfo(torch.float32).max
    with pytest.raises(FormatError, match="NaN or Inf"):
        encode(weight)


def test_values_beyond_bf16_are_refused() -> None:
    weight = from_bits([0x7F60] + [0] * 31)  # EVEN rounds it up to 4 * 2^126 = 2^128
    with pytest.raises(FormatError, match=r"2\^128"):
        snap(weight, ScaleRule.even)
    assert snap(weight, ScaleRule.floor)[0] == 1.5 * 2.0**127


@pytest.mark.parametrize("size", [0, 1, 16, 33, 95])
def test_size_must_be_whole_blocks(size: int) -> None:
    with pytest.raises(FormatError, match=rf"the last dimension of w is {size}, .*block of 32"):
        encode(torch.zeros(2, size), name="w")


@pytest.mark.parametrize("blocks", [1, 31, 33])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_shapes(blocks: int, lead: tuple[int, ...]) -> None:
    weight = gaussian(*lead, blocks * 32)
    packed = encode(weight)
    assert packed.codes.shape == (*lead, blocks * 16) and packed.scales.shape == (*lead, blocks)
    flat = encode(weight.flatten())
    assert torch.equal(flat.codes, packed.codes.flatten()) and torch.equal(flat.scales, packed.scales.flatten())
    assert decode(packed).shape == weight.shape


def test_no_rows() -> None:
    packed = encode(torch.zeros(0, 64))
    assert packed.codes.shape == (0, 32) and packed.scales.shape == (0, 2) and decode(packed).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_snap_along_another_dimension(dtype: torch.dtype) -> None:
    weight = gaussian(2, 64, 5, dtype=dtype)
    snapped = snap(weight, dim=1)
    assert snapped.dtype == dtype and snapped.is_contiguous()
    assert torch.equal(snapped, snap(weight.transpose(1, 2).contiguous()).transpose(1, 2))


def test_decode_refuses_damaged_input() -> None:
    packed = encode(gaussian(2, 64))
    with pytest.raises(FormatError, match="do not describe one tensor"):
        decode(Packed(packed.codes, packed.scales[:, :1]))
    packed.scales[1, 0] = 255
    with pytest.raises(FormatError, match="0xFF"):
        decode(packed)


@pytest.mark.parametrize("first", RULES)
@pytest.mark.parametrize("second", RULES)
def test_snapped_values_survive_every_rule(first: ScaleRule, second: ScaleRule) -> None:
    snapped = snap(gaussian(64, 256), first)
    assert same_bits(snap(snapped, second), snapped)
    assert on_grid(snapped)
    assert not on_grid(gaussian(64, 256))


@pytest.mark.parametrize("rule", RULES)
def test_re_encoding_keeps_bytes_for_even_and_floor(rule: ScaleRule) -> None:
    packed = encode(gaussian(64, 256), rule)
    again = encode(decode(packed), rule)
    unchanged = torch.equal(again.codes, packed.codes) and torch.equal(again.scales, packed.scales)
    assert unchanged is (rule is not ScaleRule.rceil)


@pytest.mark.parametrize("rule", RULES)
def test_source_is_the_bf16_cast(rule: ScaleRule) -> None:
    master = gaussian(64, 256, dtype=torch.float32)
    from_master, from_copy = encode(master, rule), encode(master.to(torch.bfloat16), rule)
    assert torch.equal(from_master.codes, from_copy.codes) and torch.equal(from_master.scales, from_copy.scales)
    # The choice matters: values that round across a midpoint in BF16 get another code from the FP32 master.
    block = torch.zeros(32)
    block[:2] = torch.tensor([6.0, 2.5 + 2**-12])
    assert snap(block)[1] == 2.0


def test_rounding_is_unbiased_where_the_grid_is_even() -> None:
    y = torch.rand(31 * 8000, generator=torch.Generator().manual_seed(0)).mul(2).to(torch.bfloat16).view(-1, 31)
    block_QB = torch.cat((y, torch.full((len(y), 1), 6.0, dtype=y.dtype)), dim=1)
    error = (snap(block_QB) - block_QB)[:, :31].double()
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 6.0] + [0.0] * 27)
    assert (snap(ties) - ties).sum() == 0


def test_even_has_the_lowest_error_and_rceil_never_clips() -> None:
    """The figures of docs/numerics.md."""
    weight = gaussian(2048, 256)
    power = weight.double().square().mean()
    error_Q = {
        rule: (snap(weight, rule).double() - weight.double()).square().unflatten(-1, (-1, 32)).mean(-1) / power
        for rule in RULES
    }
    even, floor, rceil = (error_Q[rule].mean().item() for rule in RULES)
    best = torch.minimum(error_Q[ScaleRule.floor], error_Q[ScaleRule.rceil]).mean().item()
    assert (even, floor, rceil, best) == pytest.approx((0.01258, 0.01299, 0.01402, 0.01242), rel=0.01)
    for rule, share in {ScaleRule.even: 0.272, ScaleRule.floor: 0.415, ScaleRule.rceil: 0.0}.items():
        scale = torch.exp2(encode(weight, rule).scales.float() - 127)
        clipped = weight.float().unflatten(-1, (-1, 32)).abs().amax(-1) > 6 * scale
        assert clipped.double().mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("phase", [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875])
def test_even_has_the_lowest_error_wherever_amax_lies(phase: float) -> None:
    weight = (gaussian(512, 256, dtype=torch.float32) * 2**phase).to(torch.bfloat16)
    even, floor, rceil = ((snap(weight, rule).double() - weight.double()).square().mean().item() for rule in RULES)
    assert even < min(floor, rceil)


@pytest.mark.parametrize("sigma", [0.02, 1.0, 300.0])
def test_bytes_of_compressed_tensors(sigma: float) -> None:
    """EVEN is what `mxfp4-pack-quantized` (MXFP4A16) writes; compared with its own scale and packing code."""
    weight = (gaussian(48, 256, seed=3) * (sigma / 0.02)).to(torch.bfloat16)
    scheme: QuantizationScheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    groups = weight.unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    theirs = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    ours = encode(weight, ScaleRule.even)
    assert torch.equal(ours.scales, theirs["weight_scale"])
    assert torch.equal(ours.codes, theirs["weight_packed"])
    assert torch.equal(decode(ours), compressor.decompress(theirs, scheme)["weight"])
