"""The bit stream of packed codes, against a plain one made of Python integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels.bits import pack_bits, packed_width, unpack_bits


@st.composite
def rows_of_codes(draw):
    bits = draw(st.integers(2, 8))
    n = draw(st.integers(1, 70))
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=n, max_size=n)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


def plain_words(codes: list[int], bits: int) -> list[int]:
    """One integer holds the whole stream; its 32-bit digits are the words, read as signed."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@given(rows_of_codes())
def test_round_trip_and_layout(case):
    bits, rows = case
    words = pack_bits(torch.tensor(rows), bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.tolist() == [plain_words(row, bits) for row in rows]
    codes = unpack_bits(words, bits, len(rows[0]))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == rows


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_leading_dimensions_and_dtypes(bits, dtype):
    codes = torch.arange(2 * 3 * 41).remainder(1 << bits).to(dtype).reshape(2, 3, 41)
    words = pack_bits(codes, bits)
    assert words.shape == (2, 3, packed_width(41, bits))
    assert torch.equal(unpack_bits(words, bits, 41).to(dtype), codes)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_no_rows_and_strided_words(bits):
    assert unpack_bits(pack_bits(torch.zeros(0, 33, dtype=torch.uint8), bits), bits, 33).shape == (0, 33)
    codes = torch.arange(6 * 32).remainder(1 << bits).reshape(6, 32)
    words = pack_bits(codes, bits)
    strided = words.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(unpack_bits(strided, bits, 32).long(), codes)


@pytest.mark.parametrize("stride", [(1, 2), (5, 7)])
def test_a_single_word_of_any_stride(stride):
    """torch calls such a tensor contiguous, whatever the strides are."""
    words = torch.empty_strided((1, 1), stride, dtype=torch.int32)
    words.fill_(0b_110_101)
    assert words.is_contiguous()
    assert unpack_bits(words, 3, 2).tolist() == [[5, 6]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_unpack_compiles_whole(bits):
    codes = torch.arange(5 * 50).remainder(1 << bits).reshape(5, 50)
    compiled = torch.compile(lambda w: unpack_bits(w, bits, 50), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pack_bits(codes, bits)).long(), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "says"),
    [
        (torch.tensor([[0, 8]]), 3, "0 to 8; 3 bits hold 0 to 7"),
        (torch.tensor([[-1, 2]]), 4, "from -1 to 2"),
        (torch.tensor([[1.0]]), 4, "must be integers"),
        (torch.tensor([[1]]), 1, "widths are 2 to 8"),
        (torch.tensor([[1]]), 9, "widths are 2 to 8"),
    ],
)
def test_pack_refuses(codes, bits, says):
    with pytest.raises(ValueError, match=says):
        pack_bits(codes, bits)


def test_unpack_refuses_words_that_do_not_fit():
    words = torch.zeros(4, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="33 codes of 3 bits lie in 4 int32 words, not in 3"):
        unpack_bits(words, 3, 33)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        unpack_bits(words.long(), 3, 32)
