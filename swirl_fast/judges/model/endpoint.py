"""An OpenAI-compatible chat endpoint: one try of a request, and what each way of failing means.

A failure is of one of two kinds. `Failed`: another try may succeed, here or at another endpoint (replicas.py). `Refused`: no try would
change it. An endpoint that refuses the key, the path or the model (401, 403, 404) refuses everything, which the caller must
say aloud: otherwise a whole run would silently have no verdicts. One that refuses this prompt (400, 413, 422) answers others.

Endpoints differ in what a request may say; `_Form` is what this one was found to take.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from swirl_fast.config import ConfigError, EndpointConfig, refuse_secrets
from swirl_fast.http_client import (
    MAX_BODY,
    Answer,
    BlockingHttp,
    NoAnswer,
    TooLate,
    is_loopback,
    read_json,
    warn_of_plain_http,
)
from swirl_fast.judges.judge import GIVEN_UP
from swirl_fast.judges.model.logprobs import Token, read_tokens
from swirl_fast.verdict import JudgeStats

BACKOFF = 0.5  # seconds before the second try, doubled for each further one, times a random factor in [0.5, 1.5)
GIVE_UP_AFTER = 4  # prompts that fail all their tries, none being answered, after which a call asks about no more
MAX_WAIT = 30.0  # seconds between two tries, also where the server's Retry-After asks for more
MAX_TOKENS = 2**24  # that a reply's `usage` may name; no model reads as many
ALTERNATIVES = 20  # log-probs of so many are asked for at each token: the most that OpenAI gives
FEW_ALTERNATIVES = 5  # where an endpoint refuses these
TOKEN_BYTES = 8192  # of an answer's JSON for each token with its alternatives, at most; 2 kB were seen

_RETRIED = {408, 409, 429}  # and every 5xx
_ABOUT_CONTENT = {400, 413, 422}  # e.g. a prompt longer than the model's context
_NOT_UNDERSTOOD = {400, 422}


class Refused(Exception):
    """The endpoint at this URL answered with a status that another try would not change. about_prompt: another prompt may be answered."""

    def __init__(self, status: int, body: str, url: str) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status = status
        self.url = url
        self.about_prompt = status in _ABOUT_CONTENT


class NoLogprobs(Refused):
    """It has no log-probs to give, or not in this way."""

    def __init__(self, status: int, body: str, url: str) -> None:
        super().__init__(status, body, url)
        self.about_prompt = False


class Failed(Exception):
    """A try that failed, and may succeed another time or elsewhere. wait: seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Call:
    """What the requests of one call of the judge know of each other. Thread-safe."""

    def __init__(self) -> None:
        self.stopped = threading.Event()  # the others neither start nor go on waiting
        self.reason = ""  # of the prompts that are not asked then
        self.homes: dict[str, Endpoint] = {}  # where the prompts of a group go (replicas.py)
        self._lock = threading.Lock()
        self._failed = 0
        self._answered = False

    def answered(self) -> None:
        self._answered = True

    def failed(self, reason: str) -> None:
        """All tries of a prompt failed. An endpoint that hangs takes `retries + 1` time-outs a prompt: hours for a whole call."""
        with self._lock:
            self._failed += 1
            if self._failed >= GIVE_UP_AFTER and not self._answered and not self.stopped.is_set():
                self.stop(
                    f"{GIVEN_UP}, since {self._failed} prompts failed and none was answered; one of them: {reason}"
                )

    def stop(self, reason: str) -> None:
        self.reason = reason
        self.stopped.set()

    def wait(self, seconds: float) -> bool:
        """Returns when the time is over, or at once when the call is stopped; whether it is."""
        return self.stopped.wait(seconds)


def back_off(failed: int, wait: float | None) -> float:
    """Seconds before the next try. failed: tries before, from 0. wait: what the server asked for."""
    return min(MAX_WAIT, max(BACKOFF * 2**failed * random.uniform(0.5, 1.5), wait or 0.0))


@dataclass(frozen=True)
class Reply:
    """finish: why it ends, as the endpoint says it; empty where it does not. tokens: with their log-probs, where judge.model.read asks
    for these."""

    text: str
    finish: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class _Form:
    """What an endpoint takes. limit: the name of the token limit. alternatives: log-probs of so many tokens; 0: none are asked for.
    begins: a reply can be given a beginning."""

    limit: str = "max_tokens"
    alternatives: int = 0
    begins: bool = True

    def after(self, refusal: str, beginning: str) -> _Form | None:
        """What to try next, given what the endpoint said to this one; None: nothing is left."""
        if self.limit == "max_tokens" and "max_completion_tokens" in refusal:
            return replace(self, limit="max_completion_tokens")  # the newer name, which some vendors insist on
        if self.alternatives > FEW_ALTERNATIVES and "logprob" in refusal.lower():
            return replace(self, alternatives=FEW_ALTERNATIVES)
        return replace(self, begins=False) if beginning and self.begins else None

    def request(self, prompt: str, max_tokens: int, beginning: str) -> dict[str, Any]:
        request: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], self.limit: max_tokens}
        if self.alternatives:
            request |= {"logprobs": True, "top_logprobs": self.alternatives}
        if beginning and self.begins:
            request["messages"].append({"role": "assistant", "content": beginning})
            request |= {"continue_final_message": True, "add_generation_prompt": False}  # of SGLang, vLLM, llama.cpp
        return request


class Endpoint:
    """One address. setting: which one names it, for messages. model: what the endpoint last said it serves, empty where it did not.

    Thread-safe; at most `config.concurrency` connections. Raises ConfigError for an impossible address or key.
    """

    def __init__(self, config: EndpointConfig, url: str, setting: str) -> None:
        refuse_secrets(setting, url)
        if not _is_address(url):
            raise ConfigError(
                f"{setting} is {url!r}; give the address of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:30000/v1"
            )
        key = os.environ.get(config.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the key in the environment variable {config.api_key_env} has characters no key has")
        warn_of_plain_http(url, key, setting)
        self.stats = JudgeStats()
        self.url = completions_url(url)
        self.model = ""
        self._config = config
        self._form = _Form(alternatives=ALTERNATIVES if config.read == "logprobs" else 0)
        self._lock = threading.Lock()
        self._http = BlockingHttp(key, config.concurrency, direct=is_loopback(url))

    def complete(self, prompt: str, max_tokens: int, beginning: str = "") -> Reply:
        """One completion. beginning: the judge goes on with this, where the endpoint can have it do so. Raises Failed, Refused."""
        end = time.monotonic() + self._config.timeout
        form = self._form
        answer = self._post(form, prompt, max_tokens, beginning, end)
        while answer.status in _NOT_UNDERSTOOD and (other := form.after(answer.text, beginning)) is not None:
            form = other
            answer = self._post(form, prompt, max_tokens, beginning, end)
        if answer.status == 200:
            self._form = form
        status, shown = answer.status, self._http.shown(answer.text)
        if status in _RETRIED or status >= 500:
            raise Failed(f"HTTP {status}: {shown}", _retry_after(answer.headers.get("retry-after")))
        if status != 200:
            wanted = form.alternatives and status in _NOT_UNDERSTOOD and "logprob" in answer.text.lower()
            raise (NoLogprobs if wanted else Refused)(status, shown, self.url)
        try:
            reply = self._read(read_json(answer.text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failed(f"the body is not a chat completion ({type(error).__name__}): {shown}") from None
        if form.alternatives and not reply.tokens and reply.text.removeprefix(beginning).strip():
            raise NoLogprobs(status, shown, self.url)
        return reply

    def _read(self, answer: Any) -> Reply:
        """Raises ValueError, LookupError, TypeError or AttributeError for what is no chat completion."""
        choice = answer["choices"][0]
        text, finish, model = choice["message"]["content"], choice.get("finish_reason"), answer.get("model")
        if not isinstance(text, str | None):
            raise TypeError("the content is no text")
        self._count(answer.get("usage"))
        self.model = self._http.shown(model) if isinstance(model, str) else ""
        tokens = read_tokens(choice) if self._form.alternatives else ()
        return Reply(self._http.shown(text or "", most=None), finish if isinstance(finish, str) else "", tokens)

    def _post(self, form: _Form, prompt: str, max_tokens: int, beginning: str, end: float) -> Answer:
        """The answer, whatever its status. Raises Failed without one until `end`, of time.monotonic."""
        request: dict[str, Any] = {"model": self._config.model, "temperature": self._config.temperature}
        request |= form.request(prompt, max_tokens, beginning)
        most = MAX_BODY + (TOKEN_BYTES * max_tokens if form.alternatives else 0)
        try:
            return self._http.post(self.url, request, end - time.monotonic(), most)
        except TooLate:
            raise Failed(f"time-out after {self._config.timeout:g} s") from None
        except NoAnswer as error:
            raise Failed(str(error)) from None

    def _count(self, usage: object) -> None:
        """Adds a reply's `usage`; not every endpoint sends it, and some send what cannot be."""
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details")
            prompt = _bounded(usage.get("prompt_tokens"), MAX_TOKENS)
            cached = _bounded(details.get("cached_tokens") if isinstance(details, dict) else 0, prompt)
            with self._lock:
                self.stats = JudgeStats(self.stats.prompt_tokens + prompt, self.stats.cached_tokens + cached)

    def close(self) -> None:
        self._http.stop()


def _bounded(count: object, most: int) -> int:
    return min(max(count, 0), most) if type(count) is int else 0


def describe_refusal(config: EndpointConfig, error: Refused) -> str:
    if isinstance(error, NoLogprobs):
        said = "answers without log-probs" if error.status == 200 else f"refuses: {error}"
        return (
            f"the judge's endpoint {error.url} {said}; judge.model.read=logprobs needs those of the {FEW_ALTERNATIVES} to {ALTERNATIVES} "
            "likeliest tokens (logprobs, top_logprobs), as SGLang, vLLM and llama.cpp give them. Remedy: an endpoint that does, or "
            "judge.model.read=text"
        )
    setting = "judge.model.url" if error.url == completions_url(config.url) else "judge.model.replicas"
    if 300 <= error.status < 400:
        return f"the judge's endpoint {error.url} refuses: {error}. Remedy: no redirect is followed; give the final address in {setting}"
    remedy = {
        401: f"put a valid key into the environment variable {config.api_key_env}",
        403: f"put a key with access to {config.model!r} into the environment variable {config.api_key_env}",
        404: f"check {setting}, which usually ends in /v1, and judge.model.model={config.model!r}",
    }.get(error.status, f"check {setting}, judge.model.model and the other settings under judge.model")
    return f"the judge's endpoint {error.url} refuses: {error}. Remedy: {remedy}"


def completions_url(url: str) -> str:
    return url.rstrip("/") + "/chat/completions"


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, a day at most, which is a number or a date; None when it is neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            seconds = (when - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError, TypeError, IndexError):  # also a year or a zone that no calendar has
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), 86400.0)
