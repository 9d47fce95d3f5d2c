"""Damage, seeded: to bytes, to JSON, to YAML, to safetensors. The same seed does the same damage."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values where something else was: what a careless tool writes, and what a malicious one would.
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 31, 32, 33, 127, 128, 255, 4096, 65535, 10**6, 10**9),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**40, 10**4299),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
)
PATHS = (
    *("..", ".", "", "/", "../outside/canary.safetensors", "../../etc/passwd", "/etc/passwd", "/dev/zero"),
    *("x\0y", "a" * 300, "a/" * 2000, "~", "~nobody-of-that-name/x", "./model.safetensors", "model.safetensors"),
    *("file:///etc/passwd", "C:\\x", "\ud800", "é", "‮", "builtin:../x", "builtin:", "a@\0", "org/name@../../x"),
)
PATTERNS = (
    *("re:", "re:(", "re:" + "(" * 3000 + ")" * 3000, "re:a{99999999999}", "re:((a{1000}){1000}){1000}", "re:\\"),
    *(r"re:(\w+\.?)+!", "re:(.*)*x!", "re:" + "a?" * 60 + "a" * 60, "re:(?P<a>.)(?P<a>.)", "re:[[a]", "re:(?:x){e}"),
    *("*" * 40, "*e" * 30 + "!", "e*" * 30 + "!", "re:.*", "re:.*q_proj$", "[", "[!]", "Linear", "lm_head"),
    *(
        "re:" + ".*e" * 25 + "!",
        "re:(?i).*Q_PROJ",
        "re:(?a)(?L)x",
        "re:(?<=a+)b",
        "re:(?<!a{2,9})b",
        "-:(a+)+!",
        "+:.*",
    ),
)
WORDS = (
    *("int", "float", "INT", "fp8_e4m3", "nvfp4", "mxfp4", "group", "channel", "tensor", "block", "tensor_group"),
    *("token", "attn_head", "local", "torch.uint8", "torch.float8_e4m3fn", "pack-quantized", "dense", "none", "auto"),
    *(
        "compressed-tensors",
        "gptq",
        "awq",
        "fp8",
        "modelopt",
        "gptq_v2",
        "FP8",
        "NVFP4",
        "W4A16_AWQ",
        "W4A16",
        "NVFP4A16",
    ),
    *("MIXED_PRECISION", "compressed", "frozen", "true", "null", "NaN", "128x128", "9" * 400 + "GB", "0x10", "1:59:59"),
    *("llama", "gpt2", "mixtral", "bfloat16", "torch.float16", "gelu", "yarn", "longrope", "sliding_attention"),
)
INSIDE: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, 2, 3],
    [128, 128],
    {"a": 1},
    {"": None},
    ["re:.*"],
    [0],
    [-1, -1],
)


class Mutator:
    """Random damage from one seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def value(self) -> Any:
        """Something hostile."""
        kind: tuple[Any, ...] = self.random.choice((NUMBERS, PATHS, PATTERNS, WORDS, INSIDE, INSIDE))
        found = self.random.choice(kind)
        if self.random.random() < 0.1:
            return [found, self.random.choice(kind)]
        if self.random.random() < 0.05:
            return {str(found)[:50]: found}
        return copy.deepcopy(found)

    def blob(self, data: bytes, most: int = 4) -> bytes:
        """Bytes that are wrong in a few places."""
        r, out = self.random, bytearray(data)
        for _ in range(r.randint(1, most)):
            at = r.randrange(len(out) + 1)
            match r.randrange(8):
                case 0 if out:
                    out[at % len(out)] ^= 1 << r.randrange(8)
                case 1 if out:
                    out[at % len(out)] = r.choice(b"\0\xff\x7f\x80\"{}[]:,\\0919-eE. \n\t&*!|>%@`#'")
                case 2:
                    out[at:at] = bytes(r.randrange(256) for _ in range(r.randint(1, 8)))
                case 3:
                    del out[at : at + r.randint(1, 64)]
                case 4:
                    out[at:at] = out[at : at + r.randint(1, 64)] * r.choice((1, 2, 50))
                case 5:
                    del out[at:]
                case 6:
                    number = r.choice([n for n in NUMBERS if isinstance(n, int) and -(2**63) <= n < 2**64])
                    out[at : at + 8] = (number % 2**64).to_bytes(8, "little")
                case _:
                    out[at:at] = r.choice((b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"\xef\xbb\xbf", b"\xff\xfe"))
        return bytes(out)

    def tree(self, content: Any, most: int = 3) -> Any:
        """Plain values, some of them replaced, removed, moved or added."""
        r, content = self.random, copy.deepcopy(content)
        for _ in range(r.randint(1, most)):
            spots = list(_spots(content))
            if not spots:
                return self.value()
            owner, key = r.choice(spots)
            match r.randrange(8):
                case 0:
                    del owner[key]
                case 1:
                    other, at = r.choice(spots)
                    if _has(other, at) and _has(owner, key):
                        owner[key] = copy.deepcopy(other[at])
                case 2 if isinstance(owner, dict):
                    owner[r.choice((*WORDS, *PATHS, *PATTERNS[:6]))] = self.value()
                case 3 if isinstance(owner, dict):
                    owner[r.choice((*PATHS, str(key) + "s", str(key).upper()))] = owner.pop(key)
                case 4:
                    owner[key] = [owner[key]]
                case 5 if type(owner[key]) is int and abs(owner[key]) < 2**64:
                    owner[key] = r.choice(
                        (owner[key] + 1, owner[key] - 1, -owner[key], owner[key] * 2, float(owner[key]))
                    )
                case _:
                    owner[key] = self.value()
        return content

    def json(self, content: Any) -> bytes:
        """Wrong content as JSON, or right content as wrong JSON."""
        r = self.random
        if r.random() < 0.75:
            text = json.dumps(self.tree(content))
            if r.random() < 0.9:
                return text.encode("utf-8", "surrogatepass")
        else:
            text = json.dumps(content)
        match r.randrange(6):
            case 0:
                depth = r.choice((50, 500, 5000, 100000))
                text = text.replace(":", ":" + "[" * depth + "]" * depth + ',"x":', 1)
            case 1:
                text = text[:-1] + ", " + text[1:]  # each key twice
            case 2:
                return text.encode("utf-16")
            case _:
                return self.blob(text.encode("utf-8", "surrogatepass"))
        return text.encode("utf-8", "surrogatepass")

    def safetensors(self, data: bytes) -> bytes:
        """A safetensors file with a wrong header, a wrong length, or wrong bytes."""
        r = self.random
        if r.random() < 0.3:
            return self.blob(data)
        length = int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        text = self.json(header)
        said = len(text)
        if r.random() < 0.1:
            said = r.choice((0, 1, 2**63, 2**64 - 1, 100_000_001, len(text) + len(rest), len(text) + len(rest) + 1))
        if r.random() < 0.1:
            rest = rest[: r.randrange(len(rest) + 1)]
        return said.to_bytes(8, "little") + text + rest


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else isinstance(key, int) and key < len(owner)


def _spots(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as its owner and key."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _spots(content[key])
