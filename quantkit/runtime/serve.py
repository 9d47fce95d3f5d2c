"""`quantkit serve`: transformers' own OpenAI-compatible server for one checkpoint, its weights packed.

    POST /v1/chat/completions, /v1/completions   with stream, stop, temperature, top_p, max_tokens
    GET  /v1/models, /health

Requests share batches (transformers' continuous batching) where the model can. Their keys and values then lie in pages
of transformers' own, which only its own attention reads: attn_implementation="quantkit" and packed KV caches are for
`generate`, not for serving. The model is loaded by quantkit, has the
folder's name, and nothing else is ever loaded: no other model, no code from a repository, nothing from the network.
requests.py says what is checked of a request, stopping.py what is done beyond transformers.

SIGTERM or SIGINT: no new connection is taken, requests that run are finished within `grace` seconds, and then the exit
code is 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from quantkit.errors import InputError, MissingError
from quantkit.loading import load
from quantkit.runtime.requests import BadRequest, Guard
from quantkit.runtime.stopping import Managed

NEEDED = ("fastapi", "uvicorn", "openai")
EXTRA = 'pip install "quantkit[serve]"'
PAGE, PAGES = 64, 256  # tokens of a page and pages of the cache on a CPU, where transformers would take most memory
LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger("quantkit")


@dataclass
class Server:
    """A server that is built and not yet running: the application, and what must be ended after it."""

    app: Any
    name: str
    sock: socket.socket
    end: Callable[[], None]

    @property
    def address(self) -> str:
        host, port = self.sock.getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    device: torch.device | str = "cpu",
    continuous_batching: bool = True,
    grace: float = 10.0,
    say: Callable[[str], None] = print,
) -> None:
    """Serves until a signal comes. Must be called in the main thread.

    port  0: any that is free
    name  by which clients ask for the model; the folder's own by default
    say   gets the one line that tells the address, once requests are answered
    Raises InputError for a folder that cannot be served or an address that is taken, MissingError without fastapi.
    """
    server = build(folder, host, port, name, torch.device(device), continuous_batching)
    try:
        run(server, grace, say)
    finally:
        server.end()
        server.sock.close()


def build(
    folder: str | Path, host: str, port: int, name: str | None, device: torch.device, continuous_batching: bool
) -> Server:
    """Loads the model and puts the server together. Raises as `serve` does."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise MissingError(f"serving needs {', '.join(NEEDED)}: {EXTRA}")
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so it is not a model folder; serve takes a folder")
    name = name or path.resolve().name
    if not name or set("@:") & set(name):
        raise InputError(f"a served model cannot be called {name!r}; give another --name, without @ and :")
    sock = _bind(host, port)
    try:
        model = load(path, device_map=device, dtype="auto").eval()
        tokenizer = _tokenizer(path)
        return _assemble(model, tokenizer, name, sock, continuous_batching)
    except BaseException:
        sock.close()
        raise


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        why = (getattr(e, "strerror", None) or str(e)).split(" (")[0]
        raise InputError(f"{host}:{port} cannot be listened on ({why}); choose another --port or --host") from None
    if host not in LOOPBACK:
        logger.warning("quantkit: %s can be reached from other machines, and nobody is asked for a password", host)
    return sock


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise InputError(f"{folder}: has no tokenizer that can be loaded ({str(e).splitlines()[0][:200]})") from None


def _assemble(model: Any, tokenizer: Any, name: str, sock: socket.socket, continuous_batching: bool) -> Server:
    """transformers' server around a model that is already loaded."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import TimedModel

    class Assembled(Serve):
        """Does not start by itself."""

        def start_server(self) -> None:
            pass

    batching = continuous_batching and hasattr(model, "init_continuous_batching")
    # The log level keeps transformers from writing a line for every request.
    made = Assembled(continuous_batching=batching, log_level="error", non_blocking=True, host="127.0.0.1", port=0)
    made._generation_state._cb_config = _batching_config(model.device)
    manager = made._model_manager
    manager.process_model_name = str  # without "@main": there is one revision, and it is loaded
    manager.loaded_models[name] = TimedModel(model, -1, processor=tokenizer)
    manager.force_model = name
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
    words = int(model.config.get_text_config().vocab_size)
    _manage(made._generation_state, lambda message: HTTPException(400, message), longest, words)
    for handler in (made._chat_handler, made._completion_handler):
        _sample_as_asked(handler)
    app = made.server.config.app

    async def refused(request: Any, error: Exception) -> Any:
        if isinstance(error, TemplateError):
            return JSONResponse(BadRequest(f"the chat template refuses this: {error}").body(), status_code=400)
        status, message = error.status_code, str(error.detail)  # type: ignore[attr-defined]
        return JSONResponse(BadRequest(message, status=status).body(), status_code=status)

    app.add_exception_handler(TemplateError, refused)
    app.add_exception_handler(HTTPException, refused)

    def end() -> None:
        made._generation_state.shutdown()
        manager.shutdown()

    return Server(Guard(app, name, batching=batching, made=int(time.time())), name, sock, end)


def _batching_config(device: torch.device) -> Any:
    """What transformers does not choose well by itself: each request its own sampling, and on a CPU a small cache."""
    from dataclasses import fields

    from transformers import ContinuousBatchingConfig

    options: dict[str, Any] = {"per_request_processors": True}
    if device.type == "cpu":
        known = {field.name: field.default for field in fields(ContinuousBatchingConfig)}
        page = "page_size" if known.get("page_size") else "block_size"  # its name before transformers 5.18
        options |= {page: PAGE, "num_blocks": PAGES, "max_batch_tokens": 1024}
    return ContinuousBatchingConfig(**options)


def _manage(state: Any, refuse: Any, longest: int, words: int) -> None:
    """Every manager that a handler gets from transformers is a Managed one, always the same."""
    inner = state.get_manager
    known: dict[int, Managed] = {}

    def get_manager(model_id: str, use_cb: bool = False) -> Any:
        manager = inner(model_id, use_cb=use_cb)
        if id(manager) not in known:
            known[id(manager)] = Managed(manager, refuse, longest, words)
        return known[id(manager)]

    state.get_manager = get_manager


def _sample_as_asked(handler: Any) -> None:
    """A request with a temperature or top_p of its own is sampled, also if the model's config says greedy."""
    inner = handler._build_generation_config

    def build(body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = inner(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
            config.do_sample = True
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.max_new_tokens = config.max_new_tokens or 1024
        return config

    handler._build_generation_config = build


def run(server: Server, grace: float, say: Callable[[str], None]) -> None:
    """Runs in a thread beside the main one, which waits for signals."""
    import uvicorn

    config = uvicorn.Config(server.app, log_level="warning", access_log=False)
    config.timeout_graceful_shutdown = max(1, int(grace))
    inner = uvicorn.Server(config)
    failed: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(inner.serve(sockets=[server.sock]))
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=target, name="quantkit-serve", daemon=True)
    wanted = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        inner.force_exit = inner.force_exit or wanted.is_set()
        wanted.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        thread.start()
        while thread.is_alive() and not inner.started:
            time.sleep(0.01)
        if inner.started and not wanted.is_set():
            say(f"serving {server.name} at {server.address}")
        while thread.is_alive() and not wanted.wait(0.1):
            pass
        inner.should_exit = True
        while thread.is_alive():
            thread.join(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise failed[0]
