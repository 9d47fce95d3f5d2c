"""Readers of GPTQ, AWQ, FP8 blocks, ModelOpt and gpt-oss that share nothing with quantkit: numpy, from the bytes up.

They take a safetensors file as bytes and the parsed config, and give the weights that an engine would multiply with, as
float32 (N, K). They are slow and plain on purpose: a code is cut out of its words bit by bit, an FP8 value is computed
from its sign, exponent and mantissa.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

PLAIN = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1"}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def parse(data: bytes) -> Arrays:
    """The tensors of a safetensors file. FP8, E8M0 and bfloat16 become float32, everything else what it is."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            raw = data[8 + size + start : 8 + size + end]
            arrays[name] = _array(raw, entry["dtype"]).reshape(entry["shape"])
    return arrays


def _array(raw: bytes, dtype: str) -> np.ndarray:
    if dtype in PLAIN:
        return np.frombuffer(raw, PLAIN[dtype])
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    codes = np.frombuffer(raw, np.uint8)
    if dtype == "F8_E4M3":
        return np.array([e4m3(code) for code in range(256)], np.float32)[codes]
    if dtype == "F8_E8M0":
        return np.exp2(codes.astype(np.float64) - 127).astype(np.float32)
    raise ValueError(dtype)


def e4m3(code: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, and NaN only where all seven bits are set."""
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def cut(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Code i of a row of int32 words lies at bits [i b, i b + b) of all its words put in a line."""
    rows = []
    for row in words.astype(np.int64) & 0xFFFFFFFF:
        line = sum(int(word) << (32 * at) for at, word in enumerate(row))
        rows.append([line >> (bits * i) & ((1 << bits) - 1) for i in range(count)])
    return np.array(rows, np.int64)


def gptq(t: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    """As the exllama and torch kernels of GPTQ do it: v1 adds 1 to what is stored, without wrapping."""
    bits, k, n = config["bits"], len(t["g_idx"]), t["scales"].shape[1]
    q = cut(t["qweight"].T, bits, k).T
    z = cut(t["qzeros"], bits, n) + (1 if config["checkpoint_format"] == "gptq" else 0)
    w = t["scales"].astype(np.float32)[t["g_idx"]] * (q - z[t["g_idx"]]).astype(np.float32)
    return w.T


def awq(t: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    """As AutoAWQ's gemm kernel does it: shift out the eight nibbles in the order 0, 4, 1, 5, 2, 6, 3, 7."""
    k, n = t["qweight"].shape[0], t["scales"].shape[1]
    size = k if config["group_size"] == -1 else config["group_size"]

    def nibbles(words: np.ndarray) -> np.ndarray:
        out = np.zeros((words.shape[0], n), np.int64)
        for column in range(n):
            place = (0, 4, 1, 5, 2, 6, 3, 7)[column % 8]
            out[:, column] = (words[:, column // 8].astype(np.int64) >> (4 * place)) & 15
        return out

    q, z, s = nibbles(t["qweight"]), nibbles(t["qzeros"]), t["scales"].astype(np.float32)
    group = np.arange(k) // size
    return ((q - z[group]).astype(np.float32) * s[group]).T


def fp8_block(t: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    """weight * weight_scale_inv, each scale over its block, the last ones cut off at the edge."""
    rows, columns = config["weight_block_size"]
    n, k = t["weight"].shape
    return t["weight"] * t["weight_scale_inv"][np.arange(n) // rows][:, np.arange(k) // columns]


def modelopt(t: Arrays, hf_quant_config: Mapping[str, Any]) -> np.ndarray:
    """By the quant_algo of hf_quant_config.json; scales multiply, in the order in which ModelOpt does it."""
    quantization = hf_quant_config["quantization"]
    algo = quantization["quant_algo"]
    if algo == "FP8":
        assert t["weight_scale"].shape == ()
        return t["weight"] * t["weight_scale"]
    if algo == "W4A16_AWQ":
        low, high = t["weight"] & 15, t["weight"] >> 4
        q = np.stack([low, high], 1).reshape(-1, t["weight"].shape[1]).astype(np.int64)
        w = np.where(q > 7, q - 16, q).astype(np.float32)
        return w * np.repeat(t["weight_scale"], quantization["group_size"], 1) * t["pre_quant_scale"]
    assert t["weight_scale_2"].shape == ()
    scale = t["weight_scale"] * t["weight_scale_2"]
    return E2M1[_pairs(t["weight"])] * np.repeat(scale, quantization["group_size"], 1)


def gpt_oss(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks (E, N, K / 32, 16) and scales (E, N, K / 32) -> float32 (E, N, K)."""
    values = np.ldexp(E2M1[_pairs(blocks)], scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*blocks.shape[:2], -1).astype(np.float32)


def _pairs(packed: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the low nibble."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
