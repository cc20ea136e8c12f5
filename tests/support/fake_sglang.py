"""A stand-in for an SGLang 0.5.21 server, of the standard library alone, that misbehaves when told to.

    python tests/fake_sglang.py --model-path FOLDER --weight-version V --host H --port P …    (other flags are read over)

Its tokens are pseudo-random, a function of the weights, the prompt and the number of the sample (`continuation`), so that a test can
tell which weights answered. What it takes from the real server, since the engine rests on it:

    prefix cache   one a name in `extra_key`; a prompt enters it when its request is DONE, so a burst of requests shares nothing
    n > 1          the prompt is computed into the cache once, then the samples find it; the last token is always computed
    updates        from tensors and from a group only between begin and end; names the model does not have are skipped silently
    pause          requests wait, and so does the health check, until it is given up with 503
    flush          refused while requests run
    memory         may be released by an idle server with --enable-memory-saver alone: its weights are gone then; whoever asks a server
                   for what it lacks, or gives it what it has, breaks it: from then on it answers 500

POST /misbehave {path, how, times, length}: the next `times` requests of a path (or "*"; times -1: all), or of those alone whose prompt
has `length` tokens, go wrong, see `HOW` and `FIELDS`.
GET /log: {requests: in order, with start, end, sequences and the wanted fields; peak: most sequences in flight at a time}.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import pickle
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 97

HOW = {
    "hang": "no answer at all",
    "drip": "an answer that never ends",
    "cut": "the connection ends in the middle of the answer",
    "drop": "the connection ends without an answer",
    "die": "the process ends",
    "no-json": "an answer in HTML",
    "list": "an answer that is an empty list",
    "refuse": "status 400 with success: false, as for weights that cannot be loaded",
    "refuse-200": "status 200 with success: false",
    "one too few": "of several completions, the first is missing",
    "500, 503, 429, 400, 401, 404": "that status",
}

# of /generate: what becomes of the first completion, with the field that is wrong then
FIELDS: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "no meta_info": ("meta_info", lambda a: a.pop("meta_info")),
    "meta_info a string": ("meta_info", lambda a: a.update(meta_info="x")),
    "no output_ids": ("output_ids", lambda a: a.pop("output_ids")),
    "output_ids of text": ("output_ids", lambda a: a.update(output_ids=["a"])),
    "output_ids beyond int32": ("output_ids", lambda a: a["output_ids"].__setitem__(0, 2**31)),
    "output_ids negative": ("output_ids", lambda a: a["output_ids"].__setitem__(0, -1)),
    "no tokens": ("output_ids", lambda a: (a["output_ids"].clear(), _meta(a)["output_token_logprobs"].clear())),
    "too many tokens": ("output_ids", lambda a: (_repeat(a["output_ids"]), _repeat(_meta(a)["output_token_logprobs"]))),
    "too few tokens": ("output_ids", lambda a: (a["output_ids"].pop(), _meta(a)["output_token_logprobs"].pop())),
    "tokens behind a stop token": ("output_ids", lambda a: _stop_early(a)),
    "no log-probs": ("output_token_logprobs", lambda a: _meta(a).pop("output_token_logprobs")),
    "too few log-probs": ("output_token_logprobs", lambda a: _meta(a)["output_token_logprobs"].pop()),
    "too many log-probs": ("output_token_logprobs", lambda a: _repeat(_meta(a)["output_token_logprobs"])),
    "log-prob NaN": ("output_token_logprobs", lambda a: _pair(a, 0, float("nan"))),
    "log-prob infinite": ("output_token_logprobs", lambda a: _pair(a, 0, float("-inf"))),
    "log-prob positive": ("output_token_logprobs", lambda a: _pair(a, 0, 0.5)),
    "log-prob null": ("output_token_logprobs", lambda a: _pair(a, 0, None)),
    "log-prob of another token": ("output_token_logprobs", lambda a: _pair(a, 1, VOCABULARY + 5)),
    "log-prob without token": ("output_token_logprobs", lambda a: _meta(a)["output_token_logprobs"].__setitem__(0, -1)),
    "prompt cut off": ("prompt_tokens", lambda a: _meta(a).update(prompt_tokens=_meta(a)["prompt_tokens"] - 1)),
    "no prompt_tokens": ("prompt_tokens", lambda a: _meta(a).pop("prompt_tokens")),
    "no cached_tokens": ("cached_tokens", lambda a: _meta(a).pop("cached_tokens")),
    "cached_tokens too many": ("cached_tokens", lambda a: _meta(a).update(cached_tokens=10**6)),
    "cached_tokens negative": ("cached_tokens", lambda a: _meta(a).update(cached_tokens=-1)),
    "no finish_reason": ("finish_reason", lambda a: _meta(a).pop("finish_reason")),
    "finish_reason null": ("finish_reason", lambda a: _meta(a).update(finish_reason=None)),
    "finish_reason unknown": ("finish_reason", lambda a: _meta(a).update(finish_reason={"type": "boredom"})),
    "no weight_version": ("weight_version", lambda a: _meta(a).pop("weight_version")),
    "weight_versions garbled": ("weight_versions", lambda a: _meta(a).update(weight_versions=7)),
    "weight_versions of numbers": ("weight_versions", lambda a: _meta(a).update(weight_versions=[7])),
}
# the same, of a model with experts
ROUTED: dict[str, Callable[[dict], Any]] = {
    "no routed experts": lambda a: _meta(a).pop("routed_experts"),
    "routed experts of another shape": lambda a: _meta(a).update(routed_experts="AAAA"),
    "routed experts of text": lambda a: _meta(a).update(routed_experts="of text"),
    "routed experts that are not there": lambda a: _meta(a).update(
        routed_experts=base64.b64encode(b"\x7f" * 16 * len(a["output_ids"])).decode()
    ),
}
# of /generate: what a server does whose weights were changed, or whose memory is full
STALE: dict[str, Callable[[dict], Any]] = {
    "abort": lambda a: _meta(a).update(finish_reason={"type": "abort", "message": "out of memory"}),
    "stale": lambda a: _meta(a).update(weight_version="somebody:7"),
    "stale span": lambda a: _meta(a).update(
        weight_versions=[
            {"version": "somebody:7", "start": 0, "end": 1},
            {"version": _meta(a)["weight_version"], "start": 1, "end": 2},
        ]
    ),
}


def _meta(answer: dict) -> dict:
    return answer["meta_info"]


def _pair(answer: dict, index: int, value: Any) -> None:
    _meta(answer)["output_token_logprobs"][0][index] = value


def _repeat(row: list) -> None:
    row += row * 100


def _stop_early(answer: dict) -> None:
    answer["output_ids"][0] = answer["stop_id"]
    _pair(answer, 1, answer["stop_id"])


def continuation(
    weights: str, prompt: list[int], sample: int, limit: int, stop_ids: tuple[int, ...] = ()
) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of one completion under these weights (`fingerprint`)."""
    draw = random.Random(f"{weights} {list(prompt)} {sample}")
    tokens: list[int] = []
    while len(tokens) < limit and not (tokens and tokens[-1] in stop_ids):
        tokens.append(draw.randrange(VOCABULARY))
    return tokens, [-5 * draw.random() for _ in tokens]


def routed(tokens: list[int], layers: int, rows: int) -> list[int]:
    """Numbers of two of eight experts, for each of the last `rows` tokens that were computed, a layer after the other."""
    return [(tokens[row] + layer + k) % 8 for row in range(rows) for layer in range(layers) for k in range(2)]


def read_weights(folder: str | Path) -> dict[str, bytes]:
    """Name -> digest of the bytes of all tensors in a folder's safetensors files."""
    digests = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            header = json.loads(data.read(length))
            body = data.read()
        for name, entry in header.items():
            if name != "__metadata__":
                digests[name] = hashlib.sha1(body[slice(*entry["data_offsets"])]).digest()
    config = Path(folder) / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
        digests.pop("lm_head.weight", None)  # the embedding is used
    return digests


def digest_of(tensor: Any) -> bytes:
    import torch

    return hashlib.sha1(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def fingerprint(digests: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + digests[name] for name in sorted(digests))).hexdigest()


class PrefixCache:
    """A trie of tokens, one for each extra_key."""

    def __init__(self) -> None:
        self._roots: dict[str, dict] = {}

    def add(self, key: str, tokens: list[int]) -> None:
        node = self._roots.setdefault(key, {})
        for token in tokens:
            node = node.setdefault(token, {})

    def match(self, key: str, tokens: list[int]) -> int:
        node, length = self._roots.get(key, {}), 0
        for token in tokens[:-1]:  # the last one's logits are needed
            if token not in node:
                break
            node, length = node[token], length + 1
        return length

    def __bool__(self) -> bool:
        return bool(self._roots)

    def clear(self) -> None:
        self._roots.clear()


class Fake:
    """The state of one server, and its answers."""

    def __init__(self, model_path: str, **options: Any) -> None:
        self.model_path = model_path
        self.weight_version: str = options.get("weight_version") or "default"
        self.api_key: str = options.get("api_key") or ""
        self.delay: float = options.get("delay", 0.01)  # seconds that every computation takes
        self.context: int = options.get("context", 512)
        self.sessions: bool = options.get("sessions", True)  # begin and end of an update, as from 0.5.21 on
        self.deterministic: bool = options.get("deterministic", False)
        self.saver: bool = options.get("saver", False)
        self.routes: int = options.get(
            "routes", 0
        )  # layers of which it returns the routed experts, two of eight a token
        self.released: set[str] = set()
        self.broken = ""
        self.weights = read_weights(model_path)
        self.cache = PrefixCache()
        self.paused, self.pauses, self.session = False, 0, False
        self.running = self.in_flight = self.peak = 0  # sequences
        self.lies: str | None = None  # the version that /model_info tells instead of the true one
        self.requests: list[dict[str, Any]] = []
        self.wrong: list[dict[str, Any]] = []
        self.groups: dict[str, Any] = {}
        self.changed = threading.Condition(threading.RLock())
        self.closing = threading.Event()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.weights)

    def misbehave(self, path: str, how: str, times: int = 1, length: int = 0) -> None:
        with self.changed:
            self.wrong.append({"path": path, "how": how, "times": times, "length": length})

    def behave(self) -> None:
        with self.changed:
            self.wrong.clear()

    def how(self, path: str, body: dict[str, Any]) -> str | None:
        with self.changed:
            for wrong in self.wrong:
                fits = wrong["length"] in (0, len(body.get("input_ids", ())))
                if wrong["path"] in (path, "*") and wrong["times"] and fits:
                    wrong["times"] -= 1
                    return wrong["how"]
        return None

    def of(self, path: str) -> list[dict[str, Any]]:
        """The requests of one path so far."""
        with self.changed:
            return [request for request in self.requests if request["path"] == path]

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer: a string or an object."""
        name = path.strip("/").replace("/", "_")
        if self.broken:
            return 500, self.broken
        work = getattr(self, f"{method.lower()}_{name}", None)
        if work is None or (not self.sessions and name in ("begin_weight_update", "end_weight_update")):
            return 404, {"detail": "Not Found"}
        return work(body) if method == "POST" else work()

    # what clients ask

    def get_health_generate(self) -> tuple[int, Any]:
        end = time.monotonic() + 0.3  # the real one gives up after 20 seconds
        with self.changed:
            while self.paused:
                if not self.changed.wait(end - time.monotonic()) and time.monotonic() >= end:
                    return 503, ""
        return 200, ""

    def get_model_info(self) -> tuple[int, Any]:
        version = self.weight_version if self.lies is None else self.lies
        return 200, {"model_path": self.model_path, "is_generation": True, "weight_version": version}

    def get_server_info(self) -> tuple[int, Any]:
        return 200, {
            "version": "0.5.21",
            "tp_size": 1,
            "max_req_input_len": self.context - 6,
            "enable_deterministic_inference": self.deterministic,
            "enable_memory_saver": self.saver,
            "enable_return_routed_experts": bool(self.routes),
        }

    def get_v1_models(self) -> tuple[int, Any]:
        return 200, {"object": "list", "data": [{"id": self.model_path, "max_model_len": self.context}]}

    def get_log(self) -> tuple[int, Any]:
        return 200, {"requests": self.requests, "peak": self.peak, "pid": os.getpid(), "fingerprint": self.fingerprint}

    def post_misbehave(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.misbehave(**body)
        return 200, {}

    def post_generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.released:
            return self._break("generates while its memory is released")
        prompt, parameters = body["input_ids"], body["sampling_params"]
        n, limit = parameters.get("n", 1), parameters["max_new_tokens"]
        if not prompt or len(prompt) + limit > self.context:
            return 400, {"error": {"message": f"{len(prompt)} tokens are no prompt for a context of {self.context}"}}
        stop_ids = tuple(parameters.get("stop_token_ids") or ())
        key = body.get("extra_key") or ""
        if limit == 0 or n > 1:
            cached = self._compute(prompt, key, 0, 0, ())["cached"]
            if limit == 0:
                return 200, self._completion([], [], {"type": "length", "length": 0}, len(prompt), cached)
        found = []
        threads = []
        for index in range(n):
            seeded = parameters.get("sampling_seed") if self.deterministic else None
            sample = seeded if seeded is not None else 0 if parameters["temperature"] == 0 else index
            found.append({"sample": sample})
            call = (found[-1], prompt, key, sample, limit, stop_ids)
            threads.append(threading.Thread(target=lambda call=call: call[0].update(self._compute(*call[1:]))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = []
        for one in found:
            stopped = one["tokens"][-1] in stop_ids
            finish = {"type": "stop", "matched": one["tokens"][-1]} if stopped else {"type": "length", "length": limit}
            answers.append(
                self._completion(one["tokens"], one["logprobs"], finish, len(prompt), one["cached"], one["version"])
            )
            if body.get("return_routed_experts") and self.routes:
                rows = len(prompt) + len(one["tokens"]) - 1 - body["routed_experts_start_len"]
                packed = struct.pack(f"<{2 * self.routes * rows}i", *routed(one["tokens"], self.routes, rows))
                _meta(answers[-1])["routed_experts"] = base64.b64encode(packed).decode()
        return 200, answers if n > 1 else answers[0]

    def _compute(self, prompt: list[int], key: str, sample: int, limit: int, stop_ids: tuple[int, ...]) -> dict:
        """One sequence from its way into the queue to its end; begins anew when it is paused meanwhile."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: not self.paused)
                pauses, cached = self.pauses, self.cache.match(key, prompt)
                self.running += 1
            time.sleep(self.delay)
            with self.changed:
                if self.pauses != pauses:  # retracted
                    continue
                self.running -= 1
                tokens, logprobs = continuation(self.fingerprint, prompt, sample, limit, stop_ids)
                self.cache.add(key, [*prompt, *tokens[:-1]])
                return {
                    "tokens": tokens,
                    "logprobs": logprobs,
                    "cached": cached,
                    "version": self.weight_version,
                }

    def _completion(
        self, tokens: list[int], logprobs: list[float], finish: dict, prompt: int, cached: int, version: str = ""
    ) -> dict[str, Any]:
        version = version or self.weight_version
        meta = {
            "id": "x",
            "finish_reason": finish,
            "prompt_tokens": prompt,
            "weight_version": version,
            "completion_tokens": len(tokens),
            "cached_tokens": cached,
            "output_token_logprobs": [[value, token, None] for value, token in zip(logprobs, tokens, strict=True)],
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        }
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    # what the holder of the weights asks

    def post_pause_generation(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            self.paused, self.pauses, self.running = True, self.pauses + 1, 0
        return 200, {"message": "Generation paused successfully.", "status": "ok"}

    def post_continue_generation(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            self.paused = False
            self.changed.notify_all()
        return 200, {"message": "Generation continued successfully.", "status": "ok"}

    def post_release_memory_occupation(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            if self.running > 0 and not self.paused:
                return self._break("released while it works")
            if self.saver:
                self.released |= set(body["tags"])
                if "weights" in body["tags"]:
                    self.weights = dict.fromkeys(self.weights, b"released")
        return 200, ""

    def post_resume_memory_occupation(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            if set(body["tags"]) - self.released:
                return self._break(f"has {body['tags']} already")
            self.released -= set(body["tags"])
        return 200, ""

    def _break(self, why: str) -> tuple[int, Any]:
        self.broken = f"illegal memory access: {why}"
        return 500, self.broken

    def post_flush_cache(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            if self.running > 0 and not self.paused:
                return 400, "Flush cache failed.\n"
            self.cache.clear()
        return 200, "Cache flushed.\n"

    def post_begin_weight_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.session:
            return _success(False, "a weight-update session is already open; call end_weight_update() first")
        self.session = True
        return _success(True, "Success")

    def post_end_weight_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.session:
            return _success(False, "no weight-update session is open; call begin_weight_update() first")
        self.session = False
        return _success(True, "Success")

    def post_update_weights_from_disk(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "weights" in self.released:
            return self._break("loads into weights that are released")
        weights = read_weights(body["model_path"])
        if self.weights.keys() - weights.keys():
            return _success(False, f"Failed to get weights iterator: {body['model_path']}")
        with self.changed:
            self.weights, self.model_path = weights, body["model_path"]
        return self._updated(body)

    def post_update_weights_from_tensor(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.sessions and not self.session:
            return _success(False, "update_weights_from_tensor must run between begin_weight_update() and …")
        return self._take(pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])), body)

    def post_init_weights_update_group(self, body: dict[str, Any]) -> tuple[int, Any]:
        from torch.distributed import PrefixStore, TCPStore
        from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

        name, size = body["group_name"], body["world_size"]
        store = TCPStore(body["master_address"], body["master_port"], size, False, timedelta(seconds=20))
        group, _ = _new_process_group_helper(
            size,
            body["rank_offset"],
            [],
            Backend(body["backend"]),
            PrefixStore(name, store),
            group_name=GroupName(name),
            timeout=timedelta(seconds=20),
        )
        _world.pg_group_ranks[group] = {i: i for i in range(size)}
        self.groups[name] = group
        return _success(True, "Succeeded to initialize custom process group.")

    def post_destroy_weights_update_group(self, body: dict[str, Any]) -> tuple[int, Any]:
        import torch

        group = self.groups.pop(body["group_name"], None)
        if group is None:
            return _success(False, "The group to be destroyed does not exist.")
        torch.distributed.destroy_process_group(group)
        return _success(True, "Succeeded to destroy custom process group.")

    def post_update_weights_from_distributed(self, body: dict[str, Any]) -> tuple[int, Any]:
        import torch

        if self.sessions and not self.session:
            return _success(False, "update_weights_from_distributed must run between begin_weight_update() and …")
        named = []
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            torch.distributed.broadcast(tensor, src=0, group=self.groups[body["group_name"]])
            named.append((name, tensor))
        return self._take(named, body)

    def post_update_weight_version(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            self.weight_version = body["new_version"]
        return _success(True, f"Weight version updated to {body['new_version']}")

    def _take(self, named: list, body: dict[str, Any]) -> tuple[int, Any]:
        if "weights" in self.released:
            return self._break("takes weights that are released")
        body["tensors"] = [[name, tensor.numel() * tensor.element_size()] for name, tensor in named]  # for the log
        with self.changed:
            self.weights |= {name: digest_of(tensor) for name, tensor in named if name in self.weights}
        return self._updated(body)

    def _updated(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.changed:
            if body.get("weight_version"):
                self.weight_version = body["weight_version"]
            if body.get("flush_cache", True):
                if self.running > 0 and not self.paused:
                    return 500, "Cache flush failed after updating weights"
                self.cache.clear()
        return _success(True, "Success")


def _success(done: bool, message: str) -> tuple[int, Any]:
    return 200 if done else 400, {"success": done, "message": message}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for its second packet
    fake: Fake

    def do_GET(self) -> None:
        self.handle_one({})

    def do_POST(self) -> None:
        self.handle_one(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_one(self, body: dict[str, Any]) -> None:
        fake, path = self.fake, self.path
        sequences = body.get("sampling_params", {}).get("n", 1) if path == "/generate" else 0
        entry = {"path": path, "body": body, "sequences": sequences, "start": time.monotonic(), "end": None}
        own = path in ("/log", "/misbehave")
        with fake.changed:
            if not own:
                fake.requests.append(entry)
            fake.in_flight += sequences
            fake.peak = max(fake.peak, fake.in_flight)
        try:
            self.respond(None if own else fake.how(path, body), body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            body.pop("serialized_named_tensors", None)
            with fake.changed:
                fake.in_flight -= sequences
                entry["end"] = time.monotonic()

    def respond(self, how: str | None, body: dict[str, Any]) -> None:
        fake = self.fake
        if how == "die":
            os._exit(9)
        if how in ("hang", "drip", "cut", "drop"):
            self.close_connection = True
            if how == "hang":
                fake.closing.wait(60)
            elif how == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"text": ')
                while how == "drip" and not fake.closing.wait(0.05):
                    self.wfile.write(b" ")
            return
        if fake.api_key and self.path not in ("/health_generate", "/log", "/misbehave"):
            if self.headers.get("Authorization") != f"Bearer {fake.api_key}":
                return self.send(401, {"error": "Unauthorized"})
        if how is not None and how.isdigit():
            return self.send(int(how), {"error": {"message": f"told to answer {how}"}})
        if how in ("refuse", "refuse-200"):
            return self.send(400 if how == "refuse" else 200, {"success": False, "message": "told to refuse"})
        status, answer = fake.answer(self.command, self.path, body)
        if how == "no-json":
            status, answer = 200, "<html>a proxy's own page</html>"
        elif how == "list":
            answer = []
        elif how == "one too few":
            answer = answer[1:]
        elif how is not None:
            first = answer[0] if isinstance(answer, list) else answer
            first["stop_id"] = (body["sampling_params"].get("stop_token_ids") or [0])[0]
            (FIELDS[how][1] if how in FIELDS else (STALE | ROUTED)[how])(first)
        self.send(status, answer)

    def send(self, status: int, answer: Any) -> None:
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fake: Fake, host: str = "127.0.0.1", port: int = 0) -> None:
        self.fake = fake
        super().__init__((host, port), type("OfThis", (Handler,), {"fake": fake}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


UP = "the fake server is up on port "


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--model-path", "--weight-version", "--host", "--api-key", "--config"):
        parser.add_argument(flag, default="")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--fake-delay", type=float, default=0.01)
    parser.add_argument("--fake-child", default="")  # starts a process of its own, and writes its id here
    parser.add_argument("--fake-die-on-generate", action="store_true")
    parser.add_argument("--enable-memory-saver", action="store_true")
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    parser.add_argument("--fake-deaf", action="store_true")  # does not end when asked to politely
    args, _ = parser.parse_known_args()
    settings = json.loads(Path(args.config).read_text(encoding="utf-8")) if args.config else {}
    args.api_key = args.api_key or settings.get("api-key", "")
    print(f"server_args=ServerArgs(api_key={args.api_key!r}, {settings})", flush=True)  # as the real one does
    if args.fake_child:
        import subprocess

        program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        Path(args.fake_child).write_text(str(subprocess.Popen([sys.executable, "-c", program]).pid))
    if args.fake_deaf:
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fake = Fake(
        args.model_path,
        weight_version=args.weight_version,
        api_key=args.api_key,
        delay=args.fake_delay,
        context=args.context_length,
        saver=args.enable_memory_saver,
        routes=2 * args.enable_return_routed_experts,  # as many layers as the tests' models have
    )
    if args.fake_die_on_generate:
        fake.misbehave("/generate", "die", -1)
    server = FakeServer(fake, args.host or "127.0.0.1", args.port)
    print(f"{UP}{server.server_port}", flush=True)
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
