"""quantkit serve, as a process: requests of all kinds, bad ones, many at once, and the ways to end it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import packed_models
import pytest
from typer.testing import CliRunner

from quantkit import api, presets
from quantkit.cli import app


class Running:
    """A server process; `port` is where it listens."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "quantkit", "serve", str(folder), "--port", "0", "--device", "cpu", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"{self.line!r}: {self.process.communicate()[1]}")
        self.port = int(found[1])

    def ask(self, path: str, body: Any = None, method: str | None = None, timeout: float = 120) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what stands on stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Running]:
    running = Running(folder, *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "tiny-w4"
    packed_models.save(folder, "compressed-tensors", presets.PRESETS["W4A16"])
    return folder


def text_of(answer: str) -> str:
    choice = json.loads(answer)["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def streamed(answer: str) -> tuple[str, dict[str, Any]]:
    """The text of all events, and the last event."""
    events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.startswith("data: {")]
    parts = [event["choices"][0] for event in events]
    return "".join(p.get("text") or p.get("delta", {}).get("content") or "" for p in parts), events[-1]


def check_answers(running: Running, name: str) -> None:
    """Every kind of request that is done, and that they agree."""
    assert json.loads(running.ask("/v1/models")[1])["data"][0]["id"] == name
    assert running.ask("/health")[0] == 200
    prompt = {"prompt": "The module provides a", "max_tokens": 12, "temperature": 0}
    status, answer = running.ask("/v1/completions", prompt)
    assert status == 200 and json.loads(answer)["model"] == name
    assert json.loads(answer)["usage"]["completion_tokens"] == 12
    assert json.loads(answer)["choices"][0]["finish_reason"] == "length"
    whole = text_of(answer)
    assert streamed(running.ask("/v1/completions", {**prompt, "stream": True, "model": name})[1])[0] == whole
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    before = whole[: whole.index(middle)]
    status, answer = running.ask("/v1/completions", {**prompt, "stop": ["never seen", middle]})
    assert (status, text_of(answer)) == (200, before)
    assert json.loads(answer)["choices"][0]["finish_reason"] == "stop"
    text, last = streamed(running.ask("/v1/completions", {**prompt, "stop": middle, "stream": True})[1])
    assert text == before and last["choices"][0]["finish_reason"] == "stop"
    chat = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 8, "temperature": 0}
    status, answer = running.ask("/v1/chat/completions", chat)
    assert status == 200
    assert streamed(running.ask("/v1/chat/completions", {**chat, "stream": True})[1])[0] == text_of(answer)
    sampled = {text_of(running.ask("/v1/completions", {**prompt, "temperature": 2.0})[1]) for _ in range(3)}
    assert len(sampled) > 1


def check_refusals(running: Running) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body, status in (
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", {}, 400),
        ("/v1/chat/completions", {**chat, "max_tokens": -1}, 400),
        ("/v1/chat/completions", {**chat, "model": "gpt"}, 404),
        ("/v1/chat/completions", {**chat, "nonsense": 1}, 422),
        ("/v1/completions", {"prompt": "word " * 5000}, 400),
        ("/v1/completions", {"prompt": 3}, 400),
        ("/load_model", {"model": "org/name"}, 404),
        ("/reset", {}, 404),
    ):
        found, answer = running.ask(path, body)
        assert found == status, (path, answer)
        assert json.loads(answer)["error"]["message"]
    assert running.ask("/health")[0] == 200, "it goes on"


def test_requests_and_the_end(folder: Path) -> None:
    with serving(folder) as running:
        assert running.line.startswith("serving tiny-w4 at http://127.0.0.1:")
        check_answers(running, "tiny-w4")
        check_refusals(running)
        assert load(running, clients=8, tokens=6) == [200] * 8
        code, errors = running.end()
    assert code == 0, errors
    assert "Traceback" not in errors


def load(running: Running, clients: int, tokens: int) -> list[int]:
    """As many requests at once: the status of each, 0 where the text is not as long as asked for."""
    found: list[int] = []
    start = threading.Barrier(clients)

    def client(i: int) -> None:
        body: dict[str, Any] = {"max_tokens": tokens, "temperature": (i % 3) / 2, "stream": i % 2 == 0}
        path = "/v1/completions" if i % 4 < 2 else "/v1/chat/completions"
        if path == "/v1/completions":
            body["prompt"] = f"The module number {i} provides"
        else:
            body["messages"] = [{"role": "user", "content": f"Question {i}"}]
        start.wait()
        status, answer = running.ask(path, body, timeout=300)
        last = streamed(answer)[1] if body["stream"] else json.loads(answer)
        found.append(status if 1 <= last["usage"]["completion_tokens"] <= tokens else 0)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.slow
def test_without_continuous_batching(folder: Path) -> None:
    with serving(folder, "--no-continuous-batching", "--name", "other") as running:
        check_answers(running, "other")
        check_refusals(running)
        body = {"prompt": "x", "max_tokens": 4, "temperature": 1.0, "seed": 3}
        assert text_of(running.ask("/v1/completions", body)[1]) == text_of(running.ask("/v1/completions", body)[1])
        code, errors = running.end(signal.SIGINT)
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_64_clients_on_the_embedded_model(tmp_path: Path) -> None:
    recipe = {"model": "builtin:pydocs-llama-7m", "scheme": "W4A16", "method": "rtn", "validate": "none"}
    api.quantize(recipe, out=tmp_path / "pydocs-w4", device="cpu")
    with serving(tmp_path / "pydocs-w4") as running:
        for _ in range(2):
            assert load(running, clients=64, tokens=24) == [200] * 64
        assert running.ask("/health")[0] == 200
        code, errors = running.end(signal.SIGINT)
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_requests_that_run_are_finished_first(folder: Path) -> None:
    with serving(folder, "--grace", "60") as running:
        found: list[tuple[int, str]] = []
        body = {"prompt": "The module", "max_tokens": 90, "temperature": 0}
        thread = threading.Thread(target=lambda: found.append(running.ask("/v1/completions", body)))
        running.ask("/v1/completions", {**body, "max_tokens": 1})
        thread.start()
        threading.Event().wait(0.3)
        code, _ = running.end()
        thread.join()
    assert code == 0
    assert found and found[0][0] == 200


def test_an_address_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", str(folder), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "cannot be listened on (Address already in use); choose another --port" in result.stderr


def test_what_cannot_be_served(tmp_path: Path, folder: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2 and "no config.json" in result.stderr
    result = CliRunner().invoke(app, ["serve", str(folder), "--name", "a@b", "--port", "0"])
    assert result.exit_code == 2 and "cannot be called 'a@b'" in result.stderr


def test_what_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert result.exit_code == 4
    assert 'serving needs fastapi, uvicorn, openai: pip install "quantkit[serve]"' in result.stderr
