"""What quantkit serve does beyond transformers' server: checks of requests, stop strings, sampling by request."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.runtime import requests
from quantkit.runtime.requests import CHAT, COMPLETIONS, BadRequest, Guard, checked
from quantkit.runtime.stopping import Managed, PerRequest, StopFilter, StoppedQueue, break_ties, sampling_of

MESSAGES = [{"role": "user", "content": "Hello"}]

# Requests


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
            "messages",
        ),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        *(
            (CHAT, {"messages": MESSAGES, key: value}, key)
            for key, value in (
                ("temperature", -0.1),
                ("temperature", "hot"),
                ("temperature", float("nan")),
                ("temperature", True),
                ("top_p", 0),
                ("top_p", 1.1),
                ("max_tokens", 0),
                ("max_tokens", 1.5),
                ("max_completion_tokens", -1),
                ("seed", "x"),
                ("n", 2),
                ("frequency_penalty", -1),
                ("stream", "yes"),
                ("stop", ""),
                ("stop", [3]),
                ("stop", ["x"] * 17),
                ("logit_bias", [1]),
                ("logit_bias", {"3": 1}),
                ("seed", 5),
                ("generation_config", "{}"),
            )
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(route: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as found:
        checked(route, body, "m", batching=True)
    assert found.value.status == 400
    assert found.value.param == param
    assert found.value.body()["error"]["type"] == "invalid_request_error"


def test_what_passes() -> None:
    body = {"messages": MESSAGES, "stop": "x", "temperature": 0, "top_p": 1, "seed": None, "model": "m"}
    assert checked(CHAT, body, "m", batching=True) == {
        "messages": MESSAGES,
        "stop": ["x"],
        "temperature": 0,
        "top_p": 1,
        "model": "m",
    }
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert checked(CHAT, {"messages": parts}, "m", batching=True)["model"] == "m"
    assert checked(COMPLETIONS, {"prompt": "x", "seed": 3}, "m", batching=False)["seed"] == 3
    with pytest.raises(BadRequest, match="'gpt' is not served here; it is 'm'") as found:
        checked(COMPLETIONS, {"prompt": "x", "model": "gpt"}, "m", batching=False)
    assert found.value.status == 404


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"\xff", b'{"a":' * 100_000])
def test_bodies_that_are_no_object(data: bytes) -> None:
    with pytest.raises(BadRequest):
        requests.parsed(data)


def ask(path: str, method: str = "POST", body: bytes = b"{}", **headers: str) -> tuple[int, Any, list[bytes]]:
    """Through a Guard with an application behind it that answers 200 with what it got."""
    got: list[bytes] = []
    sent: list[dict[str, Any]] = []
    pieces = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["body"] if method == "POST" else b"")
        assert dict(scope["headers"]).get(b"content-length", b"0") == str(len(got[-1])).encode()
        await requests.answer(send, 200, {})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"content-length", b"0")]}
    asyncio.run(Guard(app, "m", batching=True, made=7)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), got


def test_only_some_routes_are_open() -> None:
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions", "/docs", "/", "/v1/models/x"):
        status, body, got = ask(path)
        assert status == 404 and not got and "there is no" in body["error"]["message"]
    assert ask(CHAT, "GET")[0] == 405
    assert ask("/health", "GET")[2] == [b""]
    status, body, got = ask("/v1/models", "GET")
    assert (status, [m["id"] for m in body["data"]], got) == (200, ["m"], [])


def test_the_body_goes_on_as_it_was_checked() -> None:
    status, _, got = ask(COMPLETIONS, body=json.dumps({"prompt": "é", "stop": "x", "user": None}).encode())
    assert status == 200
    assert json.loads(got[0]) == {"prompt": "é", "stop": ["x"], "model": "m"}
    assert ask(COMPLETIONS, body=b"{")[0] == 400
    assert ask(COMPLETIONS, body=b"x" * (requests.LARGEST + 2))[0] == 413


# Stop strings


def filtered(text: str, size: int, *stops: str) -> tuple[str, bool]:
    found = StopFilter(stops)
    out = "".join(found.feed(text[i : i + size]) for i in range(0, len(text), size))
    return out + found.rest(), found.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("x\n\ny", ["\n\n"], "x"),
        ("one two three", ["three", "two"], "one "),
        ("one tw", ["two"], "one tw"),
        ("stop", ["stop"], ""),
        ("größe", ["ß"], "grö"),
    ],
)
def test_stop_strings_end_the_text_however_it_comes(size: int, text: str, stops: list[str], wanted: str) -> None:
    assert filtered(text, size, *stops) == (wanted, wanted != text)


def test_text_is_given_out_as_early_as_can_be() -> None:
    found = StopFilter(["END"])
    assert [found.feed(x) for x in ("a", "bE", "Nc", "E", "ND", "x")] == ["a", "b", "ENc", "", "", ""]


class Streamer:
    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


class Reasoning(str):
    """As transformers tags text that is not content."""


def through_queue(items: list[Any], stops: list[str]) -> tuple[list[Any], int]:
    async def run() -> tuple[list[Any], int]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        for item in items:
            queue.put_nowait(item)
        streamer = Streamer()
        out: list[Any] = []
        stopped = StoppedQueue(queue, streamer, stops)
        while not out or (out[-1] is not None and type(out[-1]).__name__ != "_StreamError"):
            out.append(await stopped.get())
            try:
                while True:
                    out.append(stopped.get_nowait())
            except asyncio.QueueEmpty:
                pass
        return out, streamer.cancelled

    return asyncio.run(run())


def test_a_queue_ends_at_a_stop_string() -> None:
    assert through_queue(["ab", "cE", "ND", "x", None], ["END"]) == (["ab", "c", None], 1)
    assert through_queue(["ab", "cE", None], ["END"]) == (["ab", "c", "E", None], 0)
    assert through_queue([Reasoning("END"), "a", None], ["END"]) == (["END", "a", None], 0)
    error = type("_StreamError", (), {"msg": "no"})()
    assert through_queue(["aE", error], ["END"]) == (["a", "E", error], 0)


# Managers


class Refused(Exception):
    pass


def config(**values: Any) -> Any:
    usual = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "max_new_tokens": 8}
    return SimpleNamespace(**{**usual, "stop_strings": None, **values})


class Batching:
    """Stands for transformers' manager of continuous batching."""

    def __init__(self) -> None:
        self._cb: Any = None
        self.added: list[dict[str, Any]] = []

        self._cb_config = None

    def init_cb(self, model: Any, gen_config: Any) -> None:
        raise AssertionError("it would start without our processors")

    def init_continuous_batching(self, generation_config: Any, continuous_batching_config: Any) -> Any:
        """Of the model, for which this stands too."""
        self.config = generation_config
        return SimpleNamespace(
            add_request=lambda ids, **options: self.added.append(options),
            start=lambda: None,
            alive=True,
            logit_processor=SimpleNamespace(logits_processor=[]),
        )

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **_: Any
    ) -> Any:
        self._cb.add_request(inputs["input_ids"], request_id=request_id, max_new_tokens=gen_config.max_new_tokens)
        self.seen = gen_config
        return asyncio.Queue(), Streamer()


def test_each_request_samples_for_itself() -> None:
    inner = Batching()
    managed = Managed(inner, Refused, longest=64, words=100)
    managed.init_cb(inner, config(repetition_penalty=1.1, sequence_bias={(1,): 2.0}))
    assert (inner.config.do_sample, inner.config.repetition_penalty, inner.config.sequence_bias) == (True, None, None)
    assert all(getattr(inner.config, name) not in (None, 0, 1.0) for name in ("temperature", "top_p"))
    cb = inner._cb
    managed.init_cb(inner, config())
    assert inner._cb is cb and isinstance(cb, PerRequest) and cb.alive

    inputs = {"input_ids": [1, 2, 3]}
    managed.generate_streaming(None, None, inputs, config(), "a")
    managed.generate_streaming(None, None, inputs, config(do_sample=True, temperature=0.7, top_p=0.9, top_k=0), "b")
    queue, _ = managed.generate_streaming(None, None, inputs, config(stop_strings=["x"], max_new_tokens=200), "c")
    assert isinstance(queue, StoppedQueue) and inner.seen.stop_strings is None
    assert inner.added == [
        {"request_id": "a", "max_new_tokens": 8, "temperature": 1.0, "top_k": 1, "top_p": 1.0},
        {"request_id": "b", "max_new_tokens": 8, "temperature": 0.7, "top_k": 100, "top_p": 0.9},
        {"request_id": "c", "max_new_tokens": 61, "temperature": 1.0, "top_k": 1, "top_p": 1.0},
    ]
    assert not managed.sampling, "nothing is left of requests that were added"


@pytest.mark.parametrize("length", [0, 64, 100])
def test_prompts_that_do_not_fit_are_refused(length: int) -> None:
    inner = Batching()
    managed = Managed(inner, Refused, longest=64, words=100)
    managed.init_cb(inner, config())
    with pytest.raises(Refused, match=f"the prompt has {length} tokens; the model takes 1 to 63"):
        managed.generate_streaming(None, None, {"input_ids": [1] * length}, config(), "a")
    assert not inner.added


def test_greedy_takes_one_of_those_that_are_as_likely() -> None:
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingTopKLogitsWarper
    from transformers.generation.logits_process import TopKLogitsWarper

    processors: list[Any] = [ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(3))]
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0], [1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 4.0]])
    tops = torch.tensor([1, 2, 1, 9], dtype=torch.int32)
    assert torch.isfinite(processors[0](scores, tops)).tolist()[0] == [False, True, True, False]
    break_ties(processors)
    assert torch.isfinite(processors[0](scores, tops)).tolist() == [
        [False, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


def test_sampling_of() -> None:
    assert sampling_of(config(do_sample=True), 100) == {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    assert sampling_of(config(do_sample=True, top_k=500), 100)["top_k"] == 100
