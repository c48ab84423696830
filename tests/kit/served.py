"""A small server in a thread that has tiny models and speaks as vLLM and SGLang do, and that can be told to misbehave.

Written from the source of both; nothing of it is checked against a real one.
"""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class FakeServer:
    """`models` by name: a function from token ids to float64 log-probabilities [T, V] of the token after each.

    asked       the contents of the requests for log-probabilities, in the order of their arrival
    max_logprobs, positions, parents, key    as a real server's settings; `parents` by name of an adapter
    chat        from the content of a request for chat completions to its answer; None: it has no such page
    broken_list  whether its list of models fails
    load        from a folder of an adapter to its function, see `AdapterHost`; None: it loads no adapters while it runs
    loaded      the names of those that were loaded, in order
    misbehave   called with each answer (a dict) and its number from 0; returns what is sent in its place: another dict, bytes, a status
                (an int), a pair of a status and headers, or "hang"
    """

    def __init__(self, models: dict[str, Callable], decode: Callable[[int], str] | None = None):
        self.models, self.decode = models, decode or (lambda token: "")
        self.asked: list[dict] = []
        self.calls = Counter()
        self.max_logprobs, self.positions, self.parents, self.key = 10_000, 4096, {}, None
        self.load: Callable | None = None
        self.chat: Callable[[dict], dict] | None = None
        self.broken_list = False
        self.loaded: list[str] = []
        self.misbehave: Callable = lambda answer, number: answer
        self.most_at_once, self._at_once, self._lock = 0, 0, threading.Lock()
        self.port, self._open = 0, set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to listen, after `stop` at the same port."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                fake._open.add(self.connection)

            def do_GET(self):
                fake.answer(self)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

            def handle_error(self, *args):  # a client that has gone
                pass

        self._listener = Listener(("127.0.0.1", self.port), Handler)
        self.port = self._listener.server_port
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As one that is killed: its port is closed, and so is every connection."""
        self._listener.shutdown()
        self._listener.server_close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.calls[request.path] += 1
        try:
            content = json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or b"{}")
            answer = self._answer(request, content)
            if request.command == "POST" and not request.path.endswith("lora_adapter"):
                with self._lock:
                    self.asked.append(content)
                    number = len(self.asked) - 1
                answer = self.misbehave(answer, number)
        finally:
            with self._lock:
                self._at_once -= 1
        self._send(request, answer)

    def _send(self, request: BaseHTTPRequestHandler, answer) -> None:
        status, headers, body = 200, {}, answer
        if answer == "hang":
            time.sleep(3)
            request.close_connection = True
            return
        if isinstance(answer, int):
            status, body = answer, {"error": {"message": f"status {answer}"}}
        elif isinstance(answer, tuple):
            status, headers = answer
            body = headers.pop("body", {})
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    def _answer(self, request: BaseHTTPRequestHandler, content: dict):
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return (401, {"body": {"error": {"message": f"wrong key {request.headers.get('Authorization')}"}}})
        if request.path == "/v1/models" and self.broken_list:
            return 500
        if request.path == "/v1/models":
            return {"data": [{"id": name, "parent": self.parents.get(name), "max_model_len": self.positions} for name in self.models]}
        if request.path == "/v1/completions":
            return self._vllm(content)
        if request.path == "/generate":
            return self._sglang(content)
        if self.chat and request.path == "/v1/chat/completions":
            return self.chat(content)
        if self.load and request.path == "/v1/load_lora_adapter":
            return self._load(content["lora_name"], content["lora_path"])
        if self.load and request.path == "/v1/unload_lora_adapter":
            return self._unload(content["lora_name"])
        return (404, {"body": {"detail": "Not Found"}})

    def _load(self, name: str, path: str):
        if name in self.models:
            return (400, {"body": {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}})
        try:
            self.models[name], self.parents[name] = self.load(path), next(iter(self.models))
        except Exception as error:
            return (400, {"body": {"error": {"message": str(error)}}})
        self.loaded.append(name)
        return f"Success: LoRA adapter '{name}' added successfully.".encode()

    def _unload(self, name: str):
        if self.models.pop(name, None) is None:
            return (404, {"body": {"error": {"message": f"The lora adapter '{name}' cannot be found."}}})
        return f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def restart(self) -> None:
        """As one that is started anew, without the adapters that it had loaded."""
        self.stop()
        self.models = {name: model for name, model in self.models.items() if name not in self.loaded}
        self.start()

    def _vllm(self, content: dict):
        if content["model"] not in self.models:
            return (404, {"body": {"error": {"message": f"The model `{content['model']}` does not exist."}}})
        if "prompt_logprobs" not in content:
            return self._written(content)
        k, ids = content["prompt_logprobs"], content["prompt"]
        if k > self.max_logprobs:
            told = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return (400, {"body": {"error": {"message": told, "type": "BadRequestError"}}})
        if len(ids) + content["max_tokens"] > self.positions:
            told = f"This model's maximum context length is {self.positions} tokens. However, your request has {len(ids)} input tokens."
            return (400, {"body": {"error": {"message": told}}})
        log_p_TV = self.models[content["model"]](ids)
        places = [None]
        for t in range(1, len(ids)):
            values, top = log_p_TV[t - 1].topk(min(k, log_p_TV.shape[1]))
            here = dict(zip(top.tolist(), values.tolist(), strict=True)) | {ids[t]: float(log_p_TV[t - 1, ids[t]])}
            places.append({str(a): {"logprob": b, "rank": 1, "decoded_token": self.decode(a)} for a, b in here.items()})
        choice = {"index": 0, "text": "", "prompt_logprobs": places, "prompt_token_ids": ids, "token_ids": [0]}
        return {"model": content["model"], "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def _written(self, content: dict):
        ids, own, why, stop, log_p = content["prompt"], [], "length", None, []
        generator = torch.Generator().manual_seed(content["seed"])
        while len(own) < content["max_tokens"] and why == "length":
            log_p_V = self.models[content["model"]](ids + own)[-1]
            if content["temperature"]:
                own.append(int(torch.multinomial((log_p_V / content["temperature"]).softmax(-1), 1, generator=generator)))
            else:
                own.append(int(log_p_V.argmax()))
            log_p.append(float(log_p_V[own[-1]]))
            if own[-1] in content["stop_token_ids"]:
                why, stop = "stop", own[-1]
        choice = {"text": "", "prompt_token_ids": ids, "token_ids": own, "finish_reason": why, "stop_reason": stop}
        if content.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": log_p, "tokens": [self.decode(token) for token in own]}
        return {"model": content["model"], "choices": [choice]}

    def _sglang(self, content: dict):
        name = content.get("lora_path") or next(iter(self.models))
        ids, start, k = content["input_ids"], content["logprob_start_len"], content["top_logprobs_num"]
        log_p_TV = self.models[name](ids)
        own, top = [[None, ids[start], None]], [None]
        for t in range(start + 1, len(ids)):
            text = self.decode(ids[t]) if content["return_text_in_logprobs"] else None
            said = 0 if ids[t] == log_p_TV.shape[1] - 1 else ids[t]
            own.append([float(log_p_TV[t - 1, ids[t]]), said, text])
            values, best = log_p_TV[t - 1].topk(k)
            top.append([[b, a, None] for a, b in zip(best.tolist(), values.tolist(), strict=True)])
        return {"text": "", "meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": top}}


def distribution_of(folder, adapter=None) -> Callable:
    """A saved model as a server has it: float64 log-probabilities [T, V] after each of the ids."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    lock = threading.Lock()

    @torch.no_grad()
    def log_probs(ids: list[int]) -> torch.Tensor:
        with lock:
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return log_probs


class AdapterHost:
    """A saved base, in float64, on which adapters are loaded while it runs: called with an adapter's folder it gives its `distribution_of`."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        self.model, self.lock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), threading.Lock()
        self.adapted, self.count = None, 0

    def __call__(self, path) -> Callable:
        from peft import PeftModel

        with self.lock:
            self.count += 1
            name = f"adapter{self.count}"
            if self.adapted is None:
                self.adapted = PeftModel.from_pretrained(self.model, path, adapter_name=name)
            else:
                self.adapted.load_adapter(path, adapter_name=name)
            self.adapted.eval()
        return lambda ids: self._log_probs(name, ids)

    def base(self, ids: list[int]) -> torch.Tensor:
        return self._log_probs(None, ids)

    @torch.no_grad()
    def _log_probs(self, name: str | None, ids: list[int]) -> torch.Tensor:
        with self.lock, contextlib.ExitStack() as plain:
            if name:
                self.adapted.set_adapter(name)
            elif self.adapted is not None:
                plain.enter_context(self.adapted.disable_adapter())
            return (self.adapted or self.model)(torch.tensor([ids])).logits[0].log_softmax(-1)


@contextlib.contextmanager
def serving(models: dict[str, Callable], decode: Callable[[int], str] | None = None) -> Iterator[FakeServer]:
    server = FakeServer(models, decode)
    try:
        yield server
    finally:
        server.stop()
