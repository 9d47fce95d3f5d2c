"""Texts to rows: documents are separated, padding is masked, bad sources are clear sentences."""

from __future__ import annotations

import json

import pytest
import torch

from quantkit import calibration
from quantkit.errors import InputError
from quantkit.hub import resolve
from quantkit.plan import tokenizer
from quantkit.stats import Observer

END = 99


class Letters:
    """A tokenizer of one token a letter: a is 0, b is 1. `bos` is put before each document when given."""

    def __init__(self, bos: int | None = None) -> None:
        self.eos_token_id = END
        self.bos = bos

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        ids = [ord(c) - ord("a") for c in text]
        return {"input_ids": ids if self.bos is None else [self.bos, *ids]}


def test_documents_are_joined_with_the_end_token_and_cut():
    rows = calibration.pack_rows(["abc", "de", "fghij"], Letters(), samples=None, length=4)
    assert rows.ids_RL.tolist() == [[0, 1, 2, END], [3, 4, END, 5], [6, 7, 8, 9]]
    assert rows.mask_RL.all()
    assert rows.report["tokens_dropped"] == 1 and rows.report["padding"] == 0


def test_only_as_many_documents_as_needed_are_read():
    rows = calibration.pack_rows(["abc", "de", "fghij"], Letters(), samples=1, length=4)
    assert rows.ids_RL.tolist() == [[0, 1, 2, END]]
    assert (rows.report["documents_used"], rows.report["documents_unused"]) == (1, 2)


def test_the_tokenizers_own_start_token_stays():
    rows = calibration.pack_rows(["ab", "c"], Letters(bos=50), samples=None, length=7)
    assert rows.ids_RL.tolist() == [[50, 0, 1, END, 50, 2, END]]


def test_one_document_a_row_is_padded_at_the_right_and_masked():
    rows = calibration.pack_rows(["ab", "abcdef"], Letters(), samples=None, length=4, packing="document")
    assert rows.mask_RL.tolist() == [[True, True, True, False], [True] * 4]
    assert rows.ids_RL[1].tolist() == [0, 1, 2, 3]
    assert rows.report["documents_cut"] == 1 and rows.report["padding"] == 1


def test_padding_is_in_no_statistic():
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    padded, alone = Observer(frozenset({"gram", "absmax"}), 8, "cpu"), Observer(frozenset({"gram", "absmax"}), 8, "cpu")
    x[0, 2:] = 1e6
    padded.update(x, mask)
    alone.update(torch.cat([x[0, :2], x[1]]))
    assert padded.tokens == alone.tokens == 6
    one, two = padded.result(), alone.result()
    assert one.gram_KK is not None and two.gram_KK is not None
    assert one.absmax_K is not None and two.absmax_K is not None
    assert torch.equal(one.gram_KK, two.gram_KK) and torch.equal(one.absmax_K, two.absmax_K)
    reference = torch.cat([x[0, :2], x[1]]).double()
    assert torch.allclose(one.gram_KK.double(), reference.T @ reference / 6, rtol=1e-5, atol=1e-6)


def test_too_little_text():
    with pytest.raises(InputError, match="has 4 tokens, less than one row of 10"):
        calibration.pack_rows(["abc"], Letters(), samples=2, length=10)


def test_hash_tells_rows_apart():
    one = calibration.pack_rows(["abcdefgh"], Letters(), samples=None, length=4)
    two = calibration.pack_rows(["abcdefgh"], Letters(), samples=None, length=4)
    other = calibration.pack_rows(["abcdefgi"], Letters(), samples=None, length=4)
    assert one.sha256 == two.sha256 != other.sha256


def test_builtin_text_repeats_the_published_rows():
    """128 rows of 512 tokens of the documentation, which is what the figures in eval/RESULTS.md were made with."""
    rows = calibration.pack_rows(
        calibration.load_texts("builtin:pydocs"), tokenizer(resolve("builtin:pydocs-llama-7m")), samples=128, length=512
    )
    assert rows.ids_RL.shape == (128, 512)
    assert rows.report["tokens"] == 65536


def test_file_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\u2028x"}\n', "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(["one", {"text": "two"}]))
    (tmp_path / "c.txt").write_text("all of it\nis one document")
    assert calibration.load_texts(str(tmp_path / "a.jsonl")) == ["one", "two\u2028x"]
    assert calibration.load_texts(str(tmp_path / "b.json")) == ["one", "two"]
    assert calibration.load_texts(str(tmp_path / "c.txt")) == ["all of it\nis one document"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"words": "x"}', "line 1: no string under the key 'text'"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "  "}', "holds no text"),
        ("a.json", b'{"text": "x"}', "a list of documents is expected"),
        ("a.json", b"[1]", "entry 0: no string"),
        ("a.txt", b"\xff\xfe\x00", "not readable as UTF-8"),
        ("a.csv", b"x", "unknown kind of text '.csv'"),
    ],
)
def test_bad_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        calibration.load_texts(str(tmp_path / name))


def test_no_such_source():
    with pytest.raises(InputError, match="not a file on this machine"):
        calibration.load_texts("nowhere.jsonl")
    with pytest.raises(InputError, match=r"no built-in text is named 'builtin:x'; known: builtin:pydocs"):
        calibration.load_texts("builtin:x")
