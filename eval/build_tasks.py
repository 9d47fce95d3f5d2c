"""Makes the data of the three tasks that quantkit ships, from the held-out documentation; always the same bytes.

    python eval/build_tasks.py [--out eval/quantkit_eval/tasks]

    pydocs_perplexity  passages of about 2000 characters, cut between paragraphs, as they stand in the source
    pydocs_cloze       prose that stops after a word such as "the"; which of four continuations comes next?
    pydocs_completion  text that stops where a name begins which stood in it before; the name is to be written

The continuations of a cloze item are true ones, each of another place: four places make four items, which have the same
four continuations and another right one each. So whoever looks at the continuations alone gets exactly one of the four
items right, whatever the rule: neither length nor wording gives the answer away. All four follow the same word, begin
with the same kind of character and differ by at most SPREAD characters.

The calibration text is read for one purpose: what occurs in it too is left out. Items are shuffled, so that the first n
are a sample of all.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantkit.hub import ASSETS

HELDOUT = ASSETS / "text" / "pydocs-heldout.jsonl"
CALIBRATION = ASSETS / "text" / "pydocs-calibration.jsonl"
OUT = Path(__file__).parent / "quantkit_eval" / "tasks"
Item = dict[str, Any]

PASSAGES, PASSAGE = 72, 2000  # how many, and characters of each, at most
GROUPS = 130  # of four cloze items
CONTEXT, CONTINUATION, SPREAD = 240, 48, 12  # characters: before, after at the least, and how much more at the most
APART = 120  # characters between two places of cloze items in a document
BEFORE = "a|an|and|are|as|be|by|for|from|in|into|is|it|not|of|on|or|that|the|this|to|when|which|with"
NAMES = {"parameter": 180, "role": 60}  # completion items of each kind
SCREEN = 600  # characters before a name
FEWEST = 150  # and at least so many
PER_NAME = 3  # completion items of one name in a document
PARAMETER = re.compile(r"(?<=[\s(]\*)[a-z_]\w{2,}(?=\*)")
ROLE = re.compile(r"(?<=:`)~?[A-Za-z_][\w.]{2,}(?=`)")
CONSTANTS = {"NULL", "None", "True", "False"}  # likely anywhere: no context is needed for them
MARKUP = re.compile(r"""\.\.|>>>|\+[-=]|\||[=\-~*^#"']{3}|:[\w ]+:""")  # a paragraph that begins so is no prose


def documents(file: Path) -> list[str]:
    """The texts of a .jsonl file with the key `text`."""
    return [json.loads(line)["text"] for line in file.read_text("utf-8").split("\n") if line.strip()]


def plain(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


# Perplexity -----------------------------------------------------------------------------------------------------------


def perplexity_items(texts: Sequence[str], known: str, rng: random.Random) -> list[Item]:
    """{"text", "document"}: runs of paragraphs of one document, of half to all of PASSAGE characters.

    known  the calibration text by `plain`; a passage with a paragraph of 100 characters that is in it is left out
    """
    items: list[Item] = []
    for number, text in _passages(texts):
        if not any(len(paragraph) >= 100 and paragraph in known for paragraph in map(plain, text.split("\n\n"))):
            items.append({"text": text, "document": number})
    rng.shuffle(items)
    return items[:PASSAGES]


def _passages(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    for number, text in enumerate(texts):
        held = ""
        for paragraph in re.split(r"\n{2,}", text.strip("\n")):
            joined = f"{held}\n\n{paragraph}" if held else paragraph
            if len(joined) > PASSAGE:
                if len(held) >= PASSAGE // 2:
                    yield number, held
                joined = paragraph if len(paragraph) <= PASSAGE else ""
            held = joined
        if len(held) >= PASSAGE // 2:
            yield number, held


# Cloze ----------------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """The paragraphs of prose of one page, each on one line, with an empty line between them."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        line = plain(block)
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= 60 and letters >= 0.8 * len(line) and line[-1] in ".:" and not MARKUP.match(line):
            kept.append(line)
    return "\n\n".join(kept)


def cloze_items(texts: Sequence[str], known: str, rng: random.Random) -> list[Item]:
    """{"context", "choices" (four), "answer" (0 to 3), "group", "document"}; four items to a group."""
    places: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for number, text in enumerate(texts):
        for place in _places(prose(text)):
            if plain(place["continuation"]) not in known:
                places[place["word"], _kind(place["continuation"])].append({**place, "document": number})
    groups: list[list[Item]] = []
    taken: dict[int, list[int]] = defaultdict(list)
    for key in sorted(places):
        rng.shuffle(places[key])
        groups += _groups(places[key], taken)
    rng.shuffle(groups)
    items = []
    for number, group in enumerate(groups[:GROUPS]):
        for place, answer in zip(group, rng.sample(range(4), 4)):
            others = [other["continuation"] for other in group if other is not place]
            rng.shuffle(others)
            choices = [*others[:answer], place["continuation"], *others[answer:]]
            item = {"context": place["context"], "choices": choices, "answer": answer}
            items.append({**item, "group": number, "document": place["document"]})
    rng.shuffle(items)
    return items


def _places(text: str) -> Iterator[Item]:
    """Where `text` can be cut: after one of the words BEFORE, if enough of the same paragraph follows."""
    for found in re.finditer(rf"(?<= )(?:{BEFORE})(?= )", text):
        cut = found.end()
        end = _find(text, "\n", cut)
        stop = min(end, _find(text, " ", cut + CONTINUATION))
        if cut >= CONTEXT and CONTINUATION <= stop - cut <= CONTINUATION + SPREAD:
            context = text[cut - CONTEXT : cut]
            context = context[context.index(" ") + 1 :]
            yield {"word": found.group(), "cut": cut, "context": context, "continuation": text[cut:stop]}


def _find(text: str, what: str, start: int) -> int:
    """Where `what` is next; the end of the text where it is no more."""
    place = text.find(what, start)
    return len(text) if place == -1 else place


def _kind(continuation: str) -> str:
    first = continuation[1]
    return "lower" if first.islower() else "upper" if first.isupper() else "markup"


def _groups(places: Sequence[Item], taken: dict[int, list[int]]) -> Iterator[list[Item]]:
    """Fours of different places, none near a place that is `taken` (by document), which grows by those chosen."""
    group: list[Item] = []
    for place in places:
        near = any(abs(place["cut"] - cut) < APART for cut in taken[place["document"]])
        if near or any(_leak(place, other) for other in group):
            continue
        group.append(place)
        if len(group) == 4:
            for member in group:
                taken[member["document"]].append(member["cut"])
            yield group
            group = []


def _leak(a: Item, b: Item) -> bool:
    """Whether one place's continuation stands in the other's text, or begins as the other's does."""
    words = [place["continuation"].split()[:2] for place in (a, b)]
    texts = [place["context"] + place["continuation"] for place in (a, b)]
    return words[0] == words[1] or a["continuation"] in texts[1] or b["continuation"] in texts[0]


# Completion -----------------------------------------------------------------------------------------------------------


def completion_items(texts: Sequence[str], known: str, rng: random.Random) -> list[Item]:
    """{"prompt", "target", "kind", "document"}: the prompt ends where `target`, which stood in it before, begins.

    A parameter (*name*) stood there at least once, the target of a role (:func:`name`) at least twice.
    """
    items = []
    for kind, pattern, least in (("parameter", PARAMETER, 1), ("role", ROLE, 2)):
        found = []
        per_name: Counter[tuple[int, str]] = Counter()
        for number, text in enumerate(texts):
            for match in pattern.finditer(text):
                name, prompt = match.group(), _before(text, match.start())
                before = len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", prompt))
                if len(prompt) < FEWEST or before < least or name in CONSTANTS or plain(prompt[-40:] + name) in known:
                    continue
                per_name[number, name] += 1
                if per_name[number, name] <= PER_NAME:
                    found.append({"prompt": prompt, "target": name, "kind": kind, "document": number})
        rng.shuffle(found)
        items += found[: NAMES[kind]]
    rng.shuffle(items)
    return items


def _before(text: str, end: int) -> str:
    """At most SCREEN characters before `end`, from the beginning of a line."""
    start = max(0, end - SCREEN)
    return text[start:end] if start == 0 else text[start:end].partition("\n")[2]


# All ------------------------------------------------------------------------------------------------------------------


def build(texts: Sequence[str], calibration: Sequence[str]) -> dict[str, list[Item]]:
    """The items of each task, by the task's name. Each task has its own generator: one does not move the others."""
    known = plain(" ".join(calibration))
    makers = {
        "pydocs_perplexity": perplexity_items,
        "pydocs_cloze": cloze_items,
        "pydocs_completion": completion_items,
    }
    return {name: make(texts, known, random.Random(name)) for name, make in makers.items()}


def write(tasks: dict[str, list[Item]], folder: Path) -> None:
    """One NAME.jsonl for each task, UTF-8, an item a line."""
    for name, items in tasks.items():
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder that gets the .jsonl files")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    tasks = build(documents(HELDOUT), documents(CALIBRATION))
    write(tasks, folder)
    for name, items in tasks.items():
        print(f"{name}: {len(items)} items, {(folder / f'{name}.jsonl').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
