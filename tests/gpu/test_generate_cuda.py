"""quantkit.generate on a GPU: a captured step gives the tokens of steps one by one, and of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import packed_models
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, StaticCache

from quantkit import hub, presets
from quantkit.runtime import bench, compiled, timing
from quantkit.runtime.generate import KEPT, generate
from quantkit.runtime.sampling import Sampling, pick

pytestmark = pytest.mark.gpu
EMBEDDED = hub.ASSETS / "pydocs-llama-7m"


def of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    tiny.save(folder / kind, kind)
    return AutoModelForCausalLM.from_pretrained(folder / kind, dtype=dtype).eval().cuda()


def ids(length: int = 11, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 4096, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()


def theirs(model: Any, prompt: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 3, "eos_token_id": -1, **options}
    found: torch.Tensor = model.generate(prompt, max_new_tokens=new, **options)
    return found


def graph_of(model: Any) -> Any:
    return model.__dict__[KEPT].decoder.graph


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("padding", [False, True])
def test_a_captured_step_gives_transformers_tokens(kind: str, padding: bool, tmp_path: Path) -> None:
    """float32, where rounding does not decide between tokens."""
    model, prompt, mask = of(kind, tmp_path), ids(11, 3), None
    if padding:
        mask = torch.ones_like(prompt)
        mask[0, :4] = mask[2, :9] = 0
    ours = generate(model, prompt, 40, attention_mask=mask, eos_token_id=[])
    assert graph_of(model) is not None
    assert torch.equal(
        ours, theirs(model, prompt, 40, attention_mask=torch.ones_like(prompt) if mask is None else mask)
    )
    one_by_one = generate(model, prompt, 40, attention_mask=mask, eos_token_id=[], graph=False)
    assert torch.equal(ours, one_by_one)


def test_a_graph_is_used_again_for_other_prompts(tmp_path: Path) -> None:
    model = of("llama", tmp_path)
    generate(model, ids(11), 40, eos_token_id=[])
    graph = graph_of(model)
    for seed, length, new in ((1, 30, 60), (2, 3, 20), (3, 80, 5)):
        prompt = ids(length, seed=seed)
        assert torch.equal(generate(model, prompt, new, eos_token_id=[]), theirs(model, prompt, new))
        assert graph_of(model) is graph
    before = generate(model, ids(), 40, eos_token_id=[])
    for _ in range(3):
        assert torch.equal(generate(model, ids(), 40, eos_token_id=[]), before)


def test_moved_weights_are_noticed(tmp_path: Path) -> None:
    model = of("llama", tmp_path)
    generate(model, ids(), 20, eos_token_id=[])
    graph = graph_of(model)
    kept = [p.data.clone() for p in model.parameters()]
    for p, other in zip(model.parameters(), kept):
        p.data = other * 1.5  # other places
    assert torch.equal(generate(model, ids(), 20, eos_token_id=[]), theirs(model, ids(), 20))
    assert graph_of(model) is not graph


def test_rows_end_and_the_host_looks_seldom(tmp_path: Path) -> None:
    model = of("llama", tmp_path)
    free = generate(model, ids(5, 3), 60, eos_token_id=[])[:, 5:]
    eos = [int(free[0, 20]), int(free[1, 7]), int(free[2, 33])]
    for every in (1, 16, 100):
        ours = generate(model, ids(5, 3), 60, eos_token_id=eos, pad_token_id=3, check_every=every)
        assert torch.equal(ours, theirs(model, ids(5, 3), 60, eos_token_id=eos))


def test_sampling_is_the_same_with_a_graph_and_without(tmp_path: Path) -> None:
    model = of("llama", tmp_path)

    def sampled(graph: bool, **options: Any) -> torch.Tensor:
        on = torch.Generator().manual_seed(5)
        return generate(model, ids(5, 2), 30, do_sample=True, generator=on, graph=graph, eos_token_id=[], **options)

    for options in ({}, {"top_k": 0, "top_p": 0.9}, {"top_k": 5, "temperature": 2.0}, {"top_k": 0}):
        assert torch.equal(sampled(True, **options), sampled(False, **options)), options


def test_a_given_static_cache(tmp_path: Path) -> None:
    model = of("llama", tmp_path)
    cache = StaticCache(model.config, max_cache_len=128)
    wanted = theirs(model, ids(), 30)
    assert torch.equal(generate(model, ids(), 30, past_key_values=cache, eos_token_id=[]), wanted)
    assert graph_of(model) is not None
    longer = torch.cat([wanted, ids(3, seed=4)], 1)
    ours = generate(model, longer, 20, past_key_values=cache, eos_token_id=[])
    assert torch.equal(ours, theirs(model, longer, 20))


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16", "W8A8"])
def test_packed_models(name: str, tmp_path: Path) -> None:
    """bfloat16: the same kernels, so a captured step must give the bytes of steps one by one."""
    size = {**packed_models.DIMS, "hidden_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    packed_models.save(tmp_path, "compressed-tensors", presets.PRESETS[name], model=size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval().cuda()
    for batch in (1, 4):
        captured = generate(model, ids(11, batch), 40, eos_token_id=[])
        assert graph_of(model) is not None
        assert torch.equal(captured, generate(model, ids(11, batch), 40, eos_token_id=[], graph=False))


@pytest.mark.parametrize("number", ["fp8", "int8", "int4"])
def test_packed_caches(number: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", hidden_size=256, head_dim=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="quantkit")
    model = model.eval().cuda()
    captured = generate(model, ids(11, 2), 40, eos_token_id=[], past_key_values=number)
    assert graph_of(model) is not None
    assert torch.equal(captured, generate(model, ids(11, 2), 40, eos_token_id=[], past_key_values=number, graph=False))


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_step(packed: bool, tmp_path: Path) -> None:
    """Inductor rounds otherwise, so that tokens may part; on a trained model the first ones must not."""
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval().cuda()
    if packed:
        size = {**packed_models.DIMS, "num_hidden_layers": 2}
        packed_models.save(tmp_path, "compressed-tensors", presets.PRESETS["W4A16"], model=size)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval().cuda()
    wanted = generate(model, ids(), 12, eos_token_id=[])
    ours = generate(model, ids(), 12, eos_token_id=[], compile=True)
    assert graph_of(model) is not None
    assert torch.equal(ours[:, : 11 + 4], wanted[:, : 11 + 4])
    assert torch.equal(generate(model, ids(), 12, eos_token_id=[], compile=True), ours)


def test_transformers_own_static_generate(tmp_path: Path) -> None:
    """A packed model in model.generate(cache_implementation="static"), which compiles by itself on a GPU."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    packed_models.save(tmp_path, "compressed-tensors", presets.PRESETS["W4A16"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval().cuda()
    assert model.hf_quantizer.is_compileable
    first = theirs(model, ids(), 20, cache_implementation="static")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    for seed in (0, 1, 2):
        again = theirs(model, ids(seed=seed), 20, cache_implementation="static")
        assert seed or torch.equal(again, first)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_package_of_the_step(packed: bool, tmp_path: Path) -> None:
    """`quantkit compile`: the tokens of the model in float32; packed, in 16 bits, its logits within their rounding."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, device_map="cuda").eval()
    if packed:
        packed_models.save(tmp_path / "m", "compressed-tensors", presets.PRESETS["W4A16"])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, device_map="cuda").eval()
    made = compiled.compile_step(model, tmp_path / "step", batch=2, slots=128)
    ours = generate(model, ids(11, 2), 40, eos_token_id=[], compile=made.folder)
    assert graph_of(model) is not None
    assert torch.equal(ours, generate(model, ids(11, 2), 40, eos_token_id=[], compile=made.folder, graph=False))
    if not packed:
        assert torch.equal(ours, generate(model, ids(11, 2), 40, eos_token_id=[]))
    generate(model, ids(11, 2), 20, eos_token_id=[], compile=made.folder)
    decoder = model.__dict__[KEPT].decoder
    with torch.no_grad():
        found, wanted = decoder.forward(), decoder._forward()  # both write the same slot of the cache
    assert (found - wanted).abs().max() < (0.04 if packed else 1e-4) * wanted.abs().max()


def test_memory_of_graphs_does_not_add_up(tmp_path: Path) -> None:
    """A kept graph goes away with its decoder: twenty batches do not add up."""
    model = of("llama", tmp_path)
    sizes = []
    for batch in range(1, 21):
        generate(model, ids(11, batch), 12, eos_token_id=[])
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] - sizes[4] < 64 << 20
    assert copy.deepcopy(model).__dict__[KEPT] is None


def test_bench(tmp_path: Path) -> None:
    packed_models.save(tmp_path, "compressed-tensors", presets.PRESETS["W4A16"])
    found = bench.bench(tmp_path, device=torch.device("cuda"), batches=(1, 2), prompt=8, new=16, runs=2)
    assert found.dense is not None and found.dense.bytes > found.packed.bytes
    assert all(speed.rate > 0 for speed in (*found.packed.speeds, *found.dense.speeds))
    assert not any("CPU" in note for note in found.notes)
    assert timing.LOOPS.keys() >= {"quantkit", "transformers-static"}


def test_the_greatest_of_a_vocabulary() -> None:
    """In parts, in eager mode and compiled: the first of equal ones, as torch.argmax."""
    for columns in (128_256, 151_936, 50_257):
        logits = torch.randint(-40, 41, (3, columns), generator=torch.Generator().manual_seed(columns)).float().cuda()
        logits[2, 7], logits[2, 70] = float("nan"), float("nan")
        choose = torch.compile(lambda x: pick(x, Sampling(), x[:, 0]), fullgraph=True, dynamic=False)
        wanted = logits.argmax(-1)
        assert torch.equal(pick(logits, Sampling(), logits[:, 0]), wanted) and torch.equal(choose(logits), wanted)
        assert wanted[:2].tolist() == [int((row == row.max()).nonzero()[0]) for row in logits[:2]]
