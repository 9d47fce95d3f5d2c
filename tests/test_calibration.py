"""Documents to rows: what separates them, what counts, what is dropped, what the report says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from quantkit import calibration, calibration_rows
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.hub import resolve
from quantkit.plan import tokenizer
from quantkit.progress import Silent
from quantkit.recipe import Recipe, json_schema
from quantkit.stats import Observer

END = 99


class Letters:
    """A tokenizer of one token a letter: a is 0, b is 1. `bos` is put before each document when given."""

    def __init__(self, bos: int | None = None, eos: int | None = END) -> None:
        self.eos_token_id = eos
        self.bos = bos

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        ids = [ord(c) - ord("a") for c in text]
        return {"input_ids": ids if self.bos is None else [self.bos, *ids]}


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def embedded() -> Any:
    return tokenizer(resolve("builtin:pydocs-llama-7m"))


def with_template(template: str | None) -> Any:
    """The embedded tokenizer with another chat template."""
    own = tokenizer(resolve("builtin:pydocs-llama-7m"))
    own.chat_template = template
    return own


def pack(texts: Any, own: Any = None, **options: Any) -> calibration.Rows:
    return calibration.pack_rows(texts, own or Letters(), **{"samples": None, "length": 4, **options})


# Packing


def test_documents_are_joined_with_the_end_token_and_cut():
    rows = pack(["abc", "de", "fghij"])
    assert rows.ids_RL.tolist() == [[0, 1, 2, END], [3, 4, END, 5], [6, 7, 8, 9]]
    assert rows.mask_RL.all()
    assert rows.report["tokens_dropped"] == 1 and rows.report["padding"] == 0


def test_a_document_may_fill_many_rows():
    rows = pack(["abcdefghijk"], length=3, samples=3)
    assert rows.ids_RL.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert rows.report["tokens_dropped"] == 3


def test_no_more_documents_are_read_than_the_rows_need():
    read = []

    def texts():
        for text in ("abc", "de", "fghij"):
            read.append(text)
            yield text

    rows = pack(texts(), samples=1)
    assert rows.ids_RL.tolist() == [[0, 1, 2, END]]
    assert read == ["abc"]
    assert rows.report["documents_read"] == 1 and not rows.report["source_exhausted"]
    assert pack(texts()).report["source_exhausted"]


def test_the_tokenizers_own_start_token_stays():
    assert pack(["ab", "c"], Letters(bos=50), length=7).ids_RL.tolist() == [[50, 0, 1, END, 50, 2, END]]


def test_one_document_a_row_is_padded_at_the_right_and_masked():
    rows = pack(["ab", "abcdef"], packing="document")
    assert rows.mask_RL.tolist() == [[True, True, True, False], [True] * 4]
    assert rows.ids_RL[1].tolist() == [0, 1, 2, 3]
    assert rows.report["documents_cut"] == 1 and rows.report["padding"] == 1
    assert rows.report["padding_share"] == 0.125


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


def test_hash_tells_rows_apart():
    one, two, other = pack(["abcdefgh"]), pack(["abcdefgh"]), pack(["abcdefgi"])
    assert one.sha256 == two.sha256 != other.sha256
    assert one.report == two.report != other.report
    masked = calibration.Rows(one.ids_RL, torch.zeros_like(one.mask_RL), {})
    assert masked.sha256 != one.sha256


def test_builtin_text_repeats_the_published_rows(embedded):
    """128 rows of 512 tokens of the documentation, which is what the figures in eval/RESULTS.md were made with."""
    rows = calibration.pack_rows(calibration.open_source("builtin:pydocs"), embedded, samples=128, length=512)
    assert rows.ids_RL.shape == (128, 512) and rows.report["tokens"] == 65536
    assert rows.sha256 == "5faea076e4b7eea43e21e363afc51e6431bceb9fe0dc859d6075bca3d8bf6967"
    assert rows.report["source"]["files"][0]["name"] == "pydocs-calibration.jsonl"


# What is dropped, and the report


def test_what_is_no_document_is_dropped_and_counted():
    texts: list[Any] = ["abcd", None, "", " \n", "abcd", "\ud800", "ef", {"text": None}, [], "abcd"]
    rows = pack(texts, packing="document", min_tokens=4)
    report = rows.report
    assert rows.ids_RL.tolist() == [[0, 1, 2, 3]]
    assert report["documents_read"] == 10 and report["documents_kept"] == 1
    assert report["documents_dropped"] == {"duplicate": 2, "empty": 3, "not text": 3, "shorter than min_tokens": 1}
    assert report["first_dropped"]["duplicate"] == "calibration_data, item 4"
    assert report["first_dropped"]["not text"] == "calibration_data, item 1: null"


def test_short_documents_stay_where_they_share_a_row_or_fill_one():
    assert pack(["ab", "cd"], min_tokens=100, length=6).ids_RL.tolist() == [[0, 1, END, 2, 3, END]]
    assert len(pack(["abcdef"], min_tokens=100, length=4, packing="document").ids_RL) == 1


def test_report_of_lengths():
    report = pack(["abcdefghi", "ab", "abcd"], packing="document").report
    assert report["document_tokens"] == {"min": 3, "median": 5, "max": 10}
    assert (report["tokens"], report["counted_tokens"], report["padding"]) == (11, 11, 1)
    assert report["documents_cut"] == 2


def test_the_data_are_known_by_their_content_not_their_origin(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["abcd", "efgh"]))
    one = pack(["abcd", "efgh"]).report
    two = pack(calibration.open_source(str(tmp_path / "a.json"))).report
    assert one["documents_sha256"] == two["documents_sha256"] != pack(["abcd"]).report["documents_sha256"]


def test_shuffling_is_by_seed_and_touches_no_global_generator():
    texts = [f"{'abcdefgh'[i % 8]}{'abcdefgh'[i // 8]}" for i in range(40)]
    random.seed(0)
    expected = random.random()
    random.seed(0)
    plain, one, two, other = (pack(texts, shuffle=k, packing="document").ids_RL.tolist() for k in (None, 1, 1, 2))
    assert random.random() == expected
    assert one == two and len({str(x) for x in (plain, one, other)}) == 3
    assert sorted(plain) == sorted(one) == sorted(other)


def test_too_little_text_says_what_there_was():
    with pytest.raises(InputError, match="python:iterable: the text has 4 tokens, less than one row of 10"):
        pack(["abc"], samples=2, length=10)
    with pytest.raises(
        InputError, match=r"holds no text to calibrate with \(2 documents read, dropped: 2 empty \(first"
    ):
        pack(["", " "])
    with pytest.raises(InputError, match=r"holds no text to calibrate with \(0 documents read\)"):
        pack([])


def test_a_tokenizer_without_an_end_token():
    with pytest.raises(InputError, match="item 0: the tokenizer has no end-of-sequence token"):
        pack(["abc"], Letters(eos=None))


# Chats

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a tuple?"},
    {"role": "assistant", "content": "An immutable sequence.\n\n    t = (1, 2)  # naïve 🐍"},
    {"role": "user", "content": "And a list?"},
    {"role": "assistant", "content": "A mutable one."},
]
SAYS = [m["content"] for m in CHAT if m["role"] == "assistant"]

# The quirks of templates in use, in few lines each.
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
WRITES_BOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
)
SYSTEM_WITH_THE_LAST_QUESTION = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if s and m == (rest | selectattr('role', 'equalto', 'user') | list | last) %}{{ s }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKS_IN_THE_LAST_TURN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
PLAIN_WORDS = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
)
TEMPLATES = {
    "generation": GENERATION,
    "writes bos": WRITES_BOS,
    "system with the last question": SYSTEM_WITH_THE_LAST_QUESTION,
    "thinks in the last turn": THINKS_IN_THE_LAST_TURN,
    "plain words": PLAIN_WORDS,
}


def chat_row(own: Any, chat: Any, length: int = 256, **options: Any) -> tuple[list[int], list[bool], dict[str, Any]]:
    """A chat in a row of its own: tokens, what counts of them, the report."""
    rows = pack([chat], own, length=length, packing="document", **options)
    size = rows.report["tokens"]
    return rows.ids_RL[0, :size].tolist(), rows.mask_RL[0, :size].tolist(), rows.report


def counted(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """Runs of tokens that count."""
    runs: list[list[int]] = []
    for i, (token, counts) in enumerate(zip(ids, mask)):
        if counts and (i == 0 or not mask[i - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return runs


def test_a_chat_is_what_its_template_makes_of_it(embedded):
    ids, mask, report = chat_row(embedded, CHAT)
    assert ids == embedded.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert embedded.decode(ids).count("<|im_start|>") == 5 and all(mask)
    assert 0 < report["template_tokens"] < len(ids)
    spoken = sum(len(embedded(m["content"], add_special_tokens=False)["input_ids"]) for m in CHAT)
    assert report["template_tokens"] == len(ids) - spoken
    assert report["template_share"] == round(1 - spoken / len(ids), 4)


@pytest.mark.parametrize("name", ["embedded", *TEMPLATES])
def test_what_counts_is_what_the_assistant_says(name, embedded):
    own = embedded if name == "embedded" else with_template(TEMPLATES[name])
    ids, mask, report = chat_row(own, CHAT, tokens="assistant")
    assert ids == own.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    runs = counted(ids, mask)
    assert [own.decode(run, skip_special_tokens=True).strip() for run in runs] == SAYS
    # The special token that ends the turn counts too, where there is one, and no other.
    ends = [own.convert_ids_to_tokens(run[-1]) for run in runs]
    assert set(ends) <= {"<|im_end|>", "<|endoftext|>"} if name != "plain words" else "<|im_end|>" not in ends
    assert sum(own.decode(run).count("<|") for run in runs) == (0 if name == "plain words" else 2)
    assert report["counted_tokens"] == sum(mask) < report["tokens"] == len(ids)
    assert report["padding"] == 256 - len(ids)


def test_both_ways_to_find_the_turns_agree(embedded):
    """The template says where the assistant speaks, or it is found out: the rows are the same."""
    one = chat_row(embedded, CHAT, tokens="assistant")
    two = chat_row(with_template(GENERATION), CHAT, tokens="assistant")
    assert one[:2] == two[:2]


@pytest.mark.parametrize(
    "says", ["<|im_start|>", "assistant", "a", "  padded  ", "\n\nlines\n\n", "user\nWhat is a tuple?", "é", "日本語"]
)
def test_turns_are_found_whatever_they_say(says, embedded):
    chat = [*CHAT[:2], {"role": "assistant", "content": says}, *CHAT[3:]]
    ids, mask, _ = chat_row(embedded, chat, tokens="assistant")
    runs = counted(ids, mask)
    # A token that begins with the header's newline and goes on into the text counts.
    assert embedded.decode(runs[0]) in (says + "<|im_end|>", "\n" + says + "<|im_end|>")
    assert embedded.decode(runs[1]) == SAYS[1] + "<|im_end|>"


def test_the_mark_is_another_where_the_chat_has_it(embedded):
    says = "\ue000 and \ue001"
    chat = [*CHAT[:2], {"role": "assistant", "content": says}]
    ids, mask, _ = chat_row(embedded, chat, tokens="assistant")
    assert embedded.decode(counted(ids, mask)[0]) == says + "<|im_end|>"


def test_a_template_that_writes_the_start_token_gets_no_second_one():
    own = with_template(WRITES_BOS)
    ids, _, _ = chat_row(own, CHAT)
    assert ids.count(own.bos_token_id) == 1 and ids[0] == own.bos_token_id


def test_chats_are_joined_as_they_are_and_texts_end_with_the_end_token(embedded):
    chat = CHAT[1:3]
    ids = embedded.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    text = embedded("Plain text.")["input_ids"]
    rows = pack([chat, "Plain text.", CHAT[3:]], embedded, length=len(ids) + len(text) + 2)
    assert rows.ids_RL[0].tolist()[:-1] == [*ids, *text, embedded.eos_token_id]


def test_a_template_that_prints_the_day_prints_a_fixed_one():
    own = with_template("Today is {{ strftime_now('%d %b %Y') }}. {% for m in messages %}{{ m.content }}{% endfor %}")
    ids, _, _ = chat_row(own, CHAT)
    assert own.decode(ids).startswith("Today is 26 Jul 2024. Be brief.")


def test_chats_without_the_template_are_plain_text(embedded):
    ids, mask, report = chat_row(embedded, CHAT, chat_template="never")
    text = "\n\n".join(m["content"] for m in CHAT)
    assert ids == [*embedded(text)["input_ids"], embedded.eos_token_id] and all(mask)
    assert report["template_tokens"] == 0


def test_chats_that_the_template_refuses_are_dropped_with_its_words():
    own = with_template(NO_SYSTEM)
    rows = pack([CHAT, CHAT[1:]], own, length=32)
    assert rows.report["documents_dropped"] == {"refused by the chat template": 1}
    assert "item 0: System role not supported" in rows.report["first_dropped"]["refused by the chat template"]
    with pytest.raises(InputError, match=r"dropped: 1 refused by the chat template .*System role not supported"):
        pack([CHAT], own, length=32)


def test_turns_without_a_word_do_not_count(embedded):
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "7"}]
    chat = [*CHAT[:2], *calls, {"role": "assistant", "content": "Seven."}]
    own = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or m.tool_calls }}<|im_end|>\n{% endfor %}"
    )
    ids, mask, _ = chat_row(own, chat, tokens="assistant")
    assert [own.decode(run) for run in counted(ids, mask)] == ["Seven.<|im_end|>"]
    rows = pack([CHAT[:2], CHAT], embedded, length=64, tokens="assistant")
    assert rows.report["documents_dropped"] == {"no assistant text": 1}


def test_messages_in_parts(embedded):
    own = with_template(
        "{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}"
    )
    chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    ids, mask, report = chat_row(own, chat, tokens="assistant")
    assert [own.decode(run, skip_special_tokens=True) for run in counted(ids, mask)] == SAYS
    assert report["template_tokens"] == 10


def test_rows_in_which_nothing_counts_are_left_out(embedded):
    chat = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "Yes."}]
    rows = pack([chat, CHAT], embedded, length=16, tokens="assistant")
    assert rows.report["rows_uncounted"] > 3 and rows.mask_RL.any(1).all()
    with pytest.raises(InputError, match="the assistant says nothing in the 1 rows of 16 tokens"):
        pack([chat], embedded, length=16, tokens="assistant", packing="document")


def test_what_assistant_tokens_need(embedded):
    with pytest.raises(InputError, match=r"item 0: is plain text, and calibration\.tokens: assistant counts only"):
        pack(["Plain text."], embedded, tokens="assistant")
    backwards = with_template("{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(InputError, match="item 0: message 4: the chat template does not write the turns one after"):
        pack([CHAT], backwards, tokens="assistant")
    twice = with_template("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="does not write the turns one after another"):
        pack([CHAT], twice, tokens="assistant")
    slow = with_template(WRITES_BOS)
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(InputError, match="needs a tokenizer that knows each token's place in the text"):
        pack([CHAT], slow, tokens="assistant")


def test_no_chat_template():
    with pytest.raises(InputError, match=r"item 0: .*the tokenizer has no chat template; put a chat_template\.jinja"):
        pack([CHAT], with_template(None))
    with pytest.raises(InputError, match="has no chat template"):
        pack([CHAT], Letters())


def test_held_out_chats_are_written_by_the_template(tmp_path, embedded):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (text,) = calibration.load_texts(str(tmp_path / "a.jsonl"), tokenizer=embedded)
    assert text == embedded.apply_chat_template(CHAT, tokenize=False)
    with pytest.raises(InputError, match=r"a.jsonl, line 1: is a chat, and texts are expected"):
        calibration.load_texts(str(tmp_path / "a.jsonl"))


# The recipe and the run


def settled(**settings: Any) -> Recipe:
    whole = {"model": "builtin:pydocs-llama-7m", "scheme": "W4A16", "validate": "none"}
    return Recipe.from_any({**whole, "calibration": {"samples": 4, "length": 64, **settings}})


def test_every_key_of_the_recipe_reaches_the_rows(tmp_path, embedded):
    chats = [[*CHAT[:2], {"role": "assistant", "content": f"Answer {i}. " * (i + 1)}] for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": c, "text": "unused"}) + "\n" for c in chats))
    settings = {"packing": "document", "min_tokens": 45, "shuffle": 3, "tokens": "assistant", "column": "chat"}
    recipe = settled(data=str(tmp_path / "a.jsonl"), **settings)
    progress = Told()
    rows = calibration_rows.read(planning.make(recipe), progress)
    source = calibration.open_source(str(tmp_path / "a.jsonl"), column="chat")
    options: dict[str, Any] = {key: value for key, value in settings.items() if key != "column"}
    expected = calibration.pack_rows(source, embedded, samples=4, length=64, **options)
    assert rows is not None and rows.sha256 == expected.sha256 and rows.report == expected.report
    assert rows.report["documents_dropped"] == {"shorter than min_tokens": 1}
    said = "\n".join(progress.lines)
    assert "4 rows of 64" in said and "documents dropped: 1 shorter than min_tokens (first" in said
    assert (
        f"{rows.report['counted_tokens']:,} tokens are the assistant's" in said and "% of the rows is padding" in said
    )
    data = calibration_rows.noted(rows)
    assert data is not None and json.loads(json.dumps(data)) == data
    assert data["sha256"] == rows.sha256 and data["source"]["files"][0]["bytes"] > 100
    assert progress.warnings == [
        f"only {rows.report['counted_tokens']} calibration tokens for layers of 768 inputs; below 3,072 the statistics "
        "fit the calibration text more than the model, and 12,288 are better: raise calibration.samples or length"
    ]


def test_texts_from_python_take_the_place_of_the_recipes():
    progress = Told()
    texts = [f"Text number {i} speaks of the number {i}. " * 9 for i in range(5)]
    rows = calibration_rows.read(planning.make(settled()), progress, iter(texts))
    assert rows is not None and rows.report["source"] == {"kind": "python", "data": "python:iterable"}
    assert progress.lines[0] == "calibration: 256 tokens in 4 rows of 64 from python:iterable"
    assert progress.lines[1].startswith("documents: 2 read, then the rows were full; 2 kept, 0 cut; ")
    few = calibration_rows.read(planning.make(settled()), progress, texts[:1])
    assert few is not None and any("gives 2 rows of 64 tokens, not the 4" in line for line in progress.warnings)


def test_texts_from_python_for_a_method_that_reads_none():
    recipe = Recipe.from_any({**settled().to_dict(), "method": {"rtn": {"scale_search": "absmax"}}})
    progress = Told()
    assert calibration_rows.read(planning.make(recipe), progress, ["a"]) is None
    assert progress.warnings == ["calibration_data is not read: this method and scheme observe nothing"]


def test_a_recipe_of_texts_from_python_cannot_be_run_again_without_them():
    with pytest.raises(InputError, match="came from Python; give them again with calibration_data"):
        calibration_rows.read(planning.make(settled(data=calibration.PYTHON)), Silent())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tokens": "assistant", "chat_template": "never"}, "tokens: assistant needs the chat template"),
        ({"split": "train"}, "calibration: split goes with a dataset of the Hub; builtin:pydocs has none"),
        ({"data": "a/b", "revision": ""}, "calibration.revision: expected text, got ''"),
        ({"shuffle": -1}, "calibration.shuffle: expected a number greater than or equal to 0, got -1"),
        ({"shuffle": True}, "calibration.shuffle: expected a whole number, got true"),
        ({"tokens": "user"}, "calibration.tokens: expected 'all' or 'assistant', got 'user'"),
        ({"columns": "a"}, "unknown key calibration.columns; did you mean column?"),
    ],
)
def test_recipes_that_make_no_sense(settings, says):
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        settled(**settings)


def test_every_key_is_described_and_the_recipe_reads_back():
    keys = json_schema()["$defs"]["Calibration"]["properties"]
    assert all(len(entry.get("description", "")) > 10 for entry in keys.values()), keys
    assert {"subset", "split", "revision", "column", "tokens", "chat_template", "shuffle", "min_tokens"} <= set(keys)
    recipe = settled(data="org/name", split="train", shuffle=7, tokens="assistant", column="chat")
    assert Recipe.parse(recipe.to_yaml()) == recipe
