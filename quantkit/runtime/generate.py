"""`quantkit.generate`: transformers' models without transformers' loop, for when that costs more than the model.

At 400 tokens a second a token has 2.5 ms; transformers' loop in Python takes as long. Here a decoding step is one CUDA
graph, with the choice of the token in it. What is done: greedy or by temperature, top_k and top_p; tokens that end a
row; batches with padding on the left; sliding windows; a static cache made here, or one that is given. All else raises
InputError by name. The tokens are those of `model.generate`, but that sampling draws other random numbers.

The graph is kept on the model, and used again by calls of the same batch, sampling and cache that fit into it.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import InputError
from quantkit.runtime.decoding import ROOM, Decoder, FullCache, capacity_of, counts_on_host
from quantkit.runtime.sampling import Sampling, check_neutral

SLOTS = 128  # a cache made here has a multiple of so many
FEWEST = 8  # tokens for which a graph is captured
KEPT = "_quantkit_decoder"
CAPTURING = ("cuda",)
# Rotary embeddings that ask the host how long the sequence is, in every step.
ASKING = ("dynamic", "longrope")

logger = logging.getLogger("quantkit")


@dataclass(frozen=True)
class _Key:
    """What a decoder is made for. marks: where the model's tensors are."""

    batch: int
    sampling: Sampling
    eos: tuple[int, ...]
    pad: int
    padded: bool
    compiled: bool | str
    captures: bool
    attention: str
    cache: int | str | None
    marks: int


@dataclass
class _Kept:
    key: _Key
    decoder: Decoder
    slots: int | None
    tokens: int
    fixed: bool  # as many slots as a package has, and no others
    tried: bool = False  # to capture, in vain

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model has captured nothing yet."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    past_key_values: Any = None,
    graph: bool | None = None,
    compile: bool | str | Path = False,
    check_every: int = 16,
    **others: Any,
) -> torch.Tensor:
    """Prompts and what the model says next, (B, L + new) int64; rows that ended are filled with the pad token.

    model             a decoder of transformers, dense or packed, on one device
    input_ids         (B, L) int64; attention_mask (B, L), zeros only at the left of a row
    max_new_tokens, do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id   None: what the model's generation
                      config says, else transformers' defaults; eos_token_id=[] ends no row
    generator         for sampling, on any device; the same seed gives the same tokens, with a graph or without
    past_key_values   None: a static cache is made. A StaticCache or quantkit.KVCache, empty or with the first tokens of
                      input_ids; or the name of a number, "fp8", "int8" or "int4", for a quantkit.KVCache
    graph             a decoding step is captured as a CUDA graph. None: on a GPU, for 8 tokens or more
    compile           the forward of a step goes through torch.compile, which takes a minute and fuses small kernels; or
                      the folder of a package that `quantkit compile` made, which takes seconds
    check_every       on a GPU, after so many tokens it is asked whether all rows have ended

    Raises InputError for arguments that do not fit, and for what is not done.
    """
    config = model.generation_config
    check_neutral(config, others)
    given = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = Sampling.of(config, given)
    tokens = max_new_tokens if max_new_tokens is not None else getattr(config, "max_new_tokens", None)
    if tokens is None or tokens < 1:
        raise InputError(f"max_new_tokens is {tokens}; it must be 1 or more")
    eos, pad = _special(config, eos_token_id, pad_token_id)
    mask, positions = _prompt(model, input_ids, attention_mask, pad, eos)
    past = _past(past_key_values, input_ids.shape[1])
    captures = _captures(model, graph, past_key_values)
    compiled = compile if isinstance(compile, bool) else str(compile)
    padded = mask is not None or isinstance(compiled, str)  # a package always takes a mask
    attention, cache = str(model.config._attn_implementation), _named(past_key_values)
    key = _Key(len(input_ids), sampling, eos, pad, padded, compiled, captures, attention, cache, _marks(model))
    decoder = _decoder(model, key, past_key_values, input_ids.shape[1], tokens)
    uniform = _uniform(tokens, len(input_ids), generator) if sampling.do_sample else None
    decoder.start(input_ids[:, past:], mask, positions[:, past:], uniform)
    with _for_decoding(model):
        if captures and decoder.graph is None and tokens > FEWEST and not model.__dict__[KEPT].tried:
            _capture(model, decoder, graph)
        made = _steps(decoder, tokens, check_every if decoder.device.type == "cuda" else 1)
    return torch.cat([input_ids, _trimmed(decoder, made).to(input_ids)], dim=1)


def _named(cache: Any) -> int | str | None:
    return cache if cache is None or isinstance(cache, str) else id(cache)


def _uniform(tokens: int, batch: int, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(tokens, batch, generator=generator, device="cpu" if generator is None else generator.device)


def _capture(model: Any, decoder: Decoder, wanted: bool | None) -> None:
    """Captures a step; where that cannot be and was not asked for, says so, once for a decoder."""
    reason = decoder.capture()
    if reason is not None and wanted:
        raise InputError(f"graph=True: {reason}; pass graph=False")
    if reason is not None:
        logger.warning("quantkit.generate: runs step by step, without a CUDA graph: %s", reason)
        model.__dict__[KEPT].tried = True


def _steps(decoder: Decoder, tokens: int, check_every: int) -> int:
    """Chooses up to `tokens` tokens, of which the first is there; returns how many there are."""
    ends = decoder.eos.numel() > 0
    if ends and decoder.all_done():
        return 1
    step = decoder.step if decoder.graph is None else decoder.graph.replay
    for made in range(1, tokens):
        step()
        if ends and made % max(1, check_every) == 0 and decoder.all_done():
            return made + 1
    return tokens


def _trimmed(decoder: Decoder, made: int) -> torch.Tensor:
    """(B, new) tokens, without the columns in which every row had ended before."""
    tokens_BT = decoder.tokens[:made].T
    if not decoder.eos.numel():
        return tokens_BT.clone()
    ended_BT = (tokens_BT[:, :, None] == decoder.eos).any(-1).cumsum(-1) > 0
    rest = int((~ended_BT.all(0)).sum())  # columns before the one in which the last row ends
    return tokens_BT[:, : rest + 1].clone()


def _special(config: Any, eos: int | list[int] | None, pad: int | None) -> tuple[tuple[int, ...], int]:
    """Tokens that end a row, and the one that fills it."""
    found = eos if eos is not None else getattr(config, "eos_token_id", None)
    if isinstance(found, torch.Tensor):
        found = found.flatten().tolist()
    ids = () if found is None else (found,) if isinstance(found, int) else tuple(found)
    pad = pad if pad is not None else getattr(config, "pad_token_id", None)
    return ids, int(pad) if pad is not None else (ids[0] if ids else 0)


def _prompt(
    model: Any, input_ids: torch.Tensor, mask: torch.Tensor | None, pad: int, eos: tuple[int, ...]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The mask, or None where there is no padding, and the position of each token. Raises InputError."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} has an encoder; quantkit.generate is for decoders: use model.generate"
        )
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise InputError(f"input_ids are {input_ids.dtype} {tuple(input_ids.shape)}; expected int64 (B, L), not empty")
    device = model.get_input_embeddings().weight.device
    if input_ids.device != device:
        raise InputError(f"input_ids are on {input_ids.device}, the model on {device}")
    if mask is None:
        if pad not in eos and bool((input_ids == pad).any()):
            raise InputError(f"input_ids hold the pad token {pad}; pass the attention_mask that the tokenizer gives")
    elif mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
    elif not bool(mask.all()):
        mask = mask.to(device=device, dtype=torch.int64)
        if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise InputError("attention_mask has zeros that are not at the left; tokenize with padding_side='left'")
        return mask, (mask.cumsum(-1) - 1).clamp(min=0)
    return None, torch.arange(input_ids.shape[1], device=device).expand(input_ids.shape)


def _captures(model: Any, wanted: bool | None, cache: Any) -> bool:
    """Whether to capture. Raises InputError where it is asked for and cannot be."""
    device = model.get_input_embeddings().weight.device
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, dict)}
    reason = ""
    if device.type not in CAPTURING:
        reason = f"the model is on {device}"
    elif len(places) > 1:
        reason = f"the model lies on {', '.join(sorted(places))}"
    elif asking := sorted(kinds.intersection(ASKING)):
        reason = f"its rotary embedding ({asking[0]}) asks the host for the length in every step"
    elif cache is not None and not isinstance(cache, str) and (counts := counts_on_host(cache)):
        reason = f"{counts} counts its tokens on the host"
    if wanted and reason:
        raise InputError(f"graph=True: no CUDA graph can be captured, because {reason}")
    if wanted is None and reason and device.type in CAPTURING:
        logger.warning("quantkit.generate: runs step by step, without a CUDA graph, because %s", reason)
    return not reason and wanted is not False


def _past(cache: Any, length: int) -> int:
    """Tokens that a given cache already has."""
    if cache is None or isinstance(cache, str):
        return 0
    if not hasattr(cache, "get_seq_length") or not hasattr(cache, "layers"):
        raise InputError(f"past_key_values is a {type(cache).__name__}; expected a StaticCache or a quantkit.KVCache")
    past = int(cache.get_seq_length())
    if past >= length:
        raise InputError(
            f"past_key_values has {past} tokens, input_ids {length}; pass the whole sequence, or cache.reset() first"
        )
    return past


def _decoder(model: Any, key: _Key, past_key_values: Any, prompt: int, tokens: int) -> Decoder:
    """The kept decoder, emptied, where it was made for the same and has room; else a new one, which is kept."""
    kept: _Kept | None = model.__dict__.get(KEPT)
    needed = prompt + tokens + ROOM
    given = past_key_values if not isinstance(past_key_values, str) else None
    if given is not None:
        capacity = capacity_of(given)
        if capacity is not None and capacity < prompt + tokens:
            raise InputError(f"past_key_values holds {capacity} tokens; {prompt} + {tokens} are wanted")
    if kept is not None and kept.key == key and kept.tokens >= tokens:
        if given is not None and kept.decoder.cache is given:
            return kept.decoder
        fits = kept.slots is not None and needed <= kept.slots and (kept.fixed or kept.slots <= 2 * needed + 4 * SLOTS)
        if given is None and fits:
            kept.decoder.cache.reset()
            return kept.decoder
    if kept is not None:  # its memory is free before new memory is asked for
        del model.__dict__[KEPT]
        kept.decoder.close()
    device = model.get_input_embeddings().weight.device
    slots = -(-needed // SLOTS) * SLOTS
    package = None
    if isinstance(key.compiled, str):
        from quantkit.runtime import compiled

        package = compiled.load(model, key.compiled)
        package.check_fits(key.batch, needed, past_key_values)
        slots = package.slots
    cache = given if given is not None else make_cache(model, past_key_values, key.batch, slots, device)
    width = slots if given is None else capacity_of(given) or prompt + tokens
    mask = None
    if key.padded:
        mask = torch.ones(key.batch, width, dtype=torch.int64, device=device)
    decoder = Decoder(model, cache, key.batch, width, key.sampling, key.eos, key.pad, mask, key.compiled is True)
    if package is not None:
        decoder.forward = package.bind(decoder)
    model.__dict__[KEPT] = _Kept(key, decoder, None if given is not None else slots, width, package is not None)
    return decoder


def make_cache(model: Any, number: str | None, batch: int, slots: int, device: torch.device) -> Any:
    """An empty cache for a model: of its dtype, or packed for "fp8", "int8" or "int4"."""
    if number is None:
        attention = str(model.config._attn_implementation)
        if attention.startswith(("flash", "flex")):
            raise InputError(
                f"attn_implementation={attention} does not go with a static cache; use 'sdpa', 'eager' or 'quantkit'"
            )
        return FullCache(model.config, slots, device)
    from quantkit.runtime import kv_cache

    if model.config._attn_implementation != "quantkit":
        logger.warning(
            "quantkit.generate: attn_implementation=%r decodes the whole %s cache at every step; "
            "model.set_attn_implementation('quantkit') reads it packed",
            model.config._attn_implementation,
            number,
        )
    return kv_cache.KVCache(number, config=model.config, max_cache_len=slots)


def _for_decoding(model: Any) -> Any:
    """transformers' own choice of how experts are computed one token at a time."""
    switch = getattr(model, "_optimize_model_for_decode", None)
    return nullcontext() if switch is None else switch()


def _marks(model: Any) -> int:
    """Changes when a tensor of the model moves, or a module takes another's place: a captured graph is then stale."""
    tensors = (*model.parameters(), *model.buffers())
    places = tuple((t.data_ptr(), t.dtype, t.shape) for t in tensors)
    modules = tuple((id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    return hash((places, modules))
