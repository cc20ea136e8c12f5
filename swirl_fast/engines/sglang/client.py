"""One SGLang server over HTTP: what is asked, and a strict reading of what it answers.

Everything that can go wrong is one of three: the server failed and another try may work (ServerFailure), it answered something that
no healthy server answers (AnswerError, which names the field), or it serves other weights than asked for (StaleWeights).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from swirl_fast.engines.engine import Completion, EngineError, Request, Tokens
from swirl_fast.http_client import MAX_BODY, Answer, Http, NoAnswer, TooLate, is_loopback, read_json, warn_of_plain_http

CONTROL_TIMEOUT = 60.0  # seconds for questions that a healthy server answers at once
TOKEN_BYTES = (
    512  # of an answer for each token: its id, its log-prob, its text and what is around them take less than 100
)
MIN_LOGPROB = -1e6  # of a token that was sampled; as a float32 it is still a number


class AnswerError(EngineError):
    """A server answered, but not what it was asked for."""


class ServerFailure(Exception):
    """A request failed in a way that another try, perhaps on another server, may not."""


class StaleWeights(ServerFailure):
    """A server serves other weights than those it was given: it was restarted, or somebody else updates it too."""


@dataclass(frozen=True)
class ServerInfo:
    version: str  # of SGLang
    model_path: str
    weight_version: str
    max_context: int  # tokens of prompt and completion together
    tensor_parallel: int
    deterministic: bool  # takes a seed with every request
    memory_saver: bool = False  # can release its memory
    routed_experts: bool = False  # can return them


@dataclass(frozen=True)
class Experts:
    """Of a model: how many a layer has, its decoder layers, how many of a layer's experts a token visits."""

    total: int
    layers: int
    visited: int


class Client:
    """url: without a path. key: sent as a bearer token; empty: none. direct: ask it without a proxy of the environment, as always on this
    machine."""

    def __init__(self, url: str, key: str, timeout: float, direct: bool = False) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        if not direct:
            warn_of_plain_http(url, key, "engine.urls")
        self._http = Http(key, direct=direct or is_loopback(url))
        self.shown = self._http.shown  # what a server says, as it may be shown

    async def close(self) -> None:
        await self._http.close()

    async def info(self, timeout: float = CONTROL_TIMEOUT) -> ServerInfo:
        model = await self.get("/model_info", timeout)
        server = await self.get("/server_info", timeout)
        served = await self.get("/v1/models", timeout)
        try:
            context = _count(served["data"][0]["max_model_len"])
            if server.get("max_req_input_len"):  # the key/value cache may hold less than the model could
                context = min(context, _count(server["max_req_input_len"]))
            return ServerInfo(
                version=self.shown(server["version"]),
                model_path=self.shown(model["model_path"], most=None),
                weight_version=self.shown(model["weight_version"], most=None),
                max_context=context,
                tensor_parallel=_count(server["tp_size"]),
                deterministic=bool(server.get("enable_deterministic_inference")),
                memory_saver=bool(server.get("enable_memory_saver")),
                routed_experts=bool(server.get("enable_return_routed_experts")),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise AnswerError(
                f"{self.url} is not an SGLang server of 0.5 or later: its description lacks or garbles {self.shown(str(error))}"
            ) from None

    async def healthy(self, timeout: float = 30.0) -> bool:
        """Whether the server can still generate: it computes one token, unless it is answering others anyway."""
        try:
            await self._send("GET", "/health_generate", None, timeout)
        except (ServerFailure, EngineError, ValueError):
            return False
        return True

    async def get(self, path: str, timeout: float = CONTROL_TIMEOUT) -> Any:
        return self._json(path, await self._send("GET", path, None, timeout))

    async def post(self, path: str, body: dict[str, Any], tokens: int = 0) -> Any:
        """tokens: that the answer describes at most."""
        most = MAX_BODY + TOKEN_BYTES * tokens
        return self._json(path, await self._send("POST", path, body, self._timeout, most=most))

    async def control(self, path: str, body: dict[str, Any], timeout: float) -> None:
        """A command that answers with `success`. Raises ServerFailure with the server's message where it did not succeed."""
        response = await self._send("POST", path, body, timeout, accept=(200, 400))
        try:
            answer = read_json(response.text)
        except ValueError:  # some commands answer in plain words
            answer = {}
        if response.status != 200 or (isinstance(answer, dict) and answer.get("success") is False):
            message = answer.get("message") if isinstance(answer, dict) else None
            raise ServerFailure(f"{self.url}{path} failed: {self.shown(message or response.text)}")

    async def exists(self, path: str, body: dict[str, Any], timeout: float) -> bool:
        """`control`, but False where the server does not know the command."""
        try:
            await self.control(path, body, timeout)
        except _NotFound:
            return False
        return True

    async def warm(self, tokens: Tokens, extra_key: str) -> int:
        """Computes the keys of a prompt into the prefix cache. Returns how many of its tokens were there already."""
        body = {
            "input_ids": np.asarray(tokens).tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "extra_key": extra_key,
        }
        answer = await self.post("/generate", body)
        meta = self._object(answer, "meta_info")
        self._check_prompt(meta, len(tokens))
        return self._integer(meta, "cached_tokens", 0, len(tokens))

    async def generate(
        self, request: Request, version: int, tag: str, seed: int | None, experts: Experts | None = None
    ) -> list[Completion]:
        """tag: the weights' name; completions of any other are refused. seed: None where the server takes none. experts: of the model.

        Raises ServerFailure, StaleWeights, AnswerError; ValueError for a request the server refuses as such.
        """
        sampling = request.sampling
        top_k, top_p = sampling.top_k, sampling.top_p
        if top_k == 1 and sampling.temperature > 0:
            # SGLang takes top_k = 1 for greedy, and when all it decodes at the moment is, its log-probs are not divided by the temperature
            top_k, top_p = 0, 1e-6
        parameters: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": top_p,
            "top_k": top_k or -1,
            "n": request.n,
            # Without stop ids nothing shall stop it. With them the model's own end-of-sequence token does too: SGLang has no
            # switch for only one of them.
            "ignore_eos": not request.stop_ids,
            "stop_token_ids": list(request.stop_ids),
            "skip_special_tokens": False,
        }
        if seed is not None:
            parameters["sampling_seed"] = seed
        body = {
            "input_ids": np.asarray(request.tokens).tolist(),
            "sampling_params": parameters,
            "return_logprob": True,
            "logprob_start_len": -1,
            "extra_key": tag,
        }
        size = 1
        if request.routed_experts:
            assert experts is not None, "asked of a model with experts only"
            body |= {"return_routed_experts": True, "routed_experts_start_len": len(request.tokens) - 1}
            size += 6 * experts.layers * experts.visited // TOKEN_BYTES + 1  # 4 bytes an expert, as base64
        answer = await self.post("/generate", body, request.n * sampling.max_new_tokens * size)
        answers = answer if isinstance(answer, list) else [answer]
        if len(answers) != request.n:
            raise AnswerError(f"{self.url}/generate: {len(answers)} completions instead of {request.n}")
        return [self._read_completion(one, request, version, tag, experts) for one in answers]

    def _read_completion(
        self, answer: Any, request: Request, version: int, tag: str, experts: Experts | None
    ) -> Completion:
        meta = self._object(answer, "meta_info")
        finish = self._object(meta, "finish_reason").get("type")
        if finish == "abort":
            message = meta["finish_reason"].get("message", "no reason given")
            raise ServerFailure(f"{self.url} aborted a request: {self.shown(message)}")
        self._check_weights(meta, tag)
        self._check_prompt(meta, len(request.tokens))
        limit = request.sampling.max_new_tokens
        tokens = self._read_tokens(answer, limit)
        logprobs = self._read_logprobs(meta, tokens)
        stopped = tokens[-1] in request.stop_ids
        if finish not in ("stop", "length"):
            self._garbled("meta_info.finish_reason.type", finish, "stop or length")
        if finish == "length" and not stopped and len(tokens) < limit:
            self._garbled("output_ids", f"{len(tokens)} tokens", f"{limit}, since it ended by length")
        if set(tokens[:-1]) & set(request.stop_ids):
            self._garbled("output_ids", tokens, "nothing after a stop token")
        cached = self._integer(meta, "cached_tokens", 0, len(request.tokens))
        routed = self._read_experts(meta, len(tokens), experts) if request.routed_experts and experts else None
        return Completion(
            np.array(tokens, np.int32), logprobs, "stop" if stopped else "length", version, cached, routed
        )

    def _check_weights(self, meta: dict[str, Any], tag: str) -> None:
        """Raises StaleWeights for a completion of which any token comes from other weights than `tag`."""
        served = meta.get("weight_version")
        if served is None:
            self._garbled("meta_info.weight_version", served, "the version of the weights")
        spans = meta.get("weight_versions") or []
        if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
            self._garbled("meta_info.weight_versions", spans, "a list of objects")
        spans = [span.get("version") for span in spans]
        if served != tag or any(span != tag for span in spans):
            found = f"{self.shown(served)!r} {self.shown(spans) if spans else ''}"
            raise StaleWeights(f"{self.url} answered with weights {found}, asked for were {tag!r}")

    def _read_tokens(self, answer: dict[str, Any], limit: int) -> list[int]:
        tokens = answer.get("output_ids")
        if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
            self._garbled("output_ids", tokens, "a list of token ids")
        if not 0 < len(tokens) <= limit:
            self._garbled("output_ids", f"{len(tokens)} tokens", f"1 to {limit}")
        return tokens

    def _read_logprobs(self, meta: dict[str, Any], tokens: list[int]) -> list[float]:
        """One natural log-probability a token, at most 0."""
        name = "meta_info.output_token_logprobs"
        pairs = meta.get("output_token_logprobs")
        if not isinstance(pairs, list) or len(pairs) != len(tokens):
            got = f"{len(pairs)} entries" if isinstance(pairs, list) else pairs
            self._garbled(name, got, f"{len(tokens)}, one a token")
        logprobs = []
        for token, pair in zip(tokens, pairs, strict=True):
            if not isinstance(pair, list) or len(pair) < 2 or pair[1] != token:
                self._garbled(name, pair, f"[log-prob, {token}, …]")
            value = pair[0]
            if type(value) not in (int, float) or not MIN_LOGPROB <= value <= 1e-3:  # which NaN is not
                self._garbled(name, value, f"a number from {MIN_LOGPROB:g} to 0")
            logprobs.append(min(float(value), 0.0))
        return logprobs

    def _read_experts(
        self, meta: dict[str, Any], tokens: int, experts: Experts
    ) -> NDArray[np.uint8] | NDArray[np.int16]:
        """As in the protocol, from int32 in base64."""
        name, given = "meta_info.routed_experts", meta.get("routed_experts")
        shape = (tokens, experts.layers, experts.visited)
        try:
            found = np.frombuffer(base64.b64decode(given or "", validate=True), "<i4").reshape(shape)
        except (TypeError, ValueError):
            self._garbled(name, given, f"{shape} integers of 4 bytes, as base64")
        if found.min(initial=0) < 0 or found.max(initial=0) >= experts.total:
            self._garbled(name, f"{found.min()} to {found.max()}", f"numbers of {experts.total} experts, from 0")
        return found.astype(np.uint8) if experts.total <= 256 else found.astype(np.int16)

    def _check_prompt(self, meta: dict[str, Any], length: int) -> None:
        if self._integer(meta, "prompt_tokens", 0, None) != length:
            self._garbled("meta_info.prompt_tokens", meta["prompt_tokens"], f"{length}: nothing may be cut off")

    def _object(self, answer: Any, name: str) -> dict[str, Any]:
        value = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(value, dict):
            self._garbled(name, value, "an object")
        return value

    def _integer(self, meta: dict[str, Any], name: str, low: int, high: int | None) -> int:
        value = meta.get(name)
        if type(value) is not int or value < low or (high is not None and value > high):
            self._garbled(
                f"meta_info.{name}", value, f"an integer from {low}" + ("" if high is None else f" to {high}")
            )
        return value

    def _garbled(self, name: str, value: object, wanted: str) -> NoReturn:
        raise AnswerError(
            f"{self.url}/generate: {name} is {self.shown(value, 200)!r}, expected {wanted}. Is this an SGLang server of 0.5.20 or later?"
        )

    def _json(self, path: str, answer: Answer) -> Any:
        try:
            return read_json(answer.text)
        except ValueError:
            raise AnswerError(f"{self.url}{path}: the answer is not JSON: {self.shown(answer.text)!r}") from None

    async def _send(
        self, method: str, path: str, body: Any, timeout: float, accept: tuple[int, ...] = (200,), most: int = MAX_BODY
    ) -> Answer:
        try:
            answer = await self._http.ask(method, self.url + path, body, timeout, most)
        except TooLate as error:
            raise ServerFailure(f"{self.url}{path} did not answer in {timeout:g} s ({error})") from None
        except NoAnswer as error:
            raise ServerFailure(f"{self.url}{path}: {error}") from None
        status, text = answer.status, self.shown(answer.text)
        if status in accept:
            return answer
        if status in (401, 403):
            raise EngineError(
                f"{self.url} refuses the key (HTTP {status}): put the right one into engine.api_key_env's variable"
            )
        if status == 404:
            raise _NotFound(f"{self.url}{path}: HTTP 404; is this an SGLang server?")
        if 400 <= status < 500 and status not in (408, 429):
            raise ValueError(f"{self.url}{path} refuses the request (HTTP {status}): {text}")
        raise ServerFailure(f"{self.url}{path}: HTTP {status}: {text}")


class _NotFound(EngineError):
    pass


def _count(value: object) -> int:
    """Of a server's description. Raises ValueError for what no count of tokens or devices is."""
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError("a count that is no whole number from 1 on")
    return value
