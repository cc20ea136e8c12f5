"""An OpenAI-compatible chat endpoint: one try of a request, and what each way of failing means.

A failure is of one of two kinds. `Failed`: another try may succeed, here or at another endpoint (replicas.py). `Refused`: no try would
change it. An endpoint that refuses the key, the path or the model (401, 403, 404) refuses everything, which the caller must
say aloud: otherwise a whole run would silently have no verdicts. One that refuses this prompt (400, 413, 422) answers others.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from swirl_fast.config import ConfigError, EndpointConfig
from swirl_fast.judges.judge import GIVEN_UP
from swirl_fast.loopback import is_loopback
from swirl_fast.verdict import JudgeStats

BACKOFF = 0.5  # seconds before the second try, doubled for each further one, times a random factor in [0.5, 1.5)
GIVE_UP_AFTER = 4  # prompts that fail all their tries, none being answered, after which a call asks about no more
MAX_WAIT = 30.0  # seconds between two tries, also where the server's Retry-After asks for more

_RETRIED = {408, 409, 429}  # and every 5xx
_ABOUT_CONTENT = {400, 413, 422}  # e.g. a prompt longer than the model's context


class Refused(Exception):
    """The endpoint at this URL answered with a status that another try would not change. about_prompt: another prompt may be answered."""

    def __init__(self, status: int, body: str, url: str) -> None:
        super().__init__(f"HTTP {status}: {body[:300]}")
        self.status = status
        self.url = url
        self.about_prompt = status in _ABOUT_CONTENT


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


class Endpoint:
    """One address. setting: which one names it, for messages. model: what the endpoint last said it serves, empty where it did not.

    Thread-safe; at most `config.concurrency` connections. Raises ConfigError for an impossible address or key.
    """

    def __init__(self, config: EndpointConfig, url: str, setting: str) -> None:
        if not _is_address(url):
            raise ConfigError(
                f"{setting} is {url!r}; give the address of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:30000/v1"
            )
        key = os.environ.get(config.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the key in the environment variable {config.api_key_env} has characters no key has")
        self.stats = JudgeStats()
        self.url = completions_url(url)
        self.model = ""
        self._config = config
        self._limit_name = "max_tokens"
        self._lock = threading.Lock()
        self._client = httpx.Client(
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=config.timeout,
            trust_env=not is_loopback(url),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        )

    def complete(self, prompt: str, max_tokens: int) -> tuple[str, str]:
        """(text, finish reason) of one completion. Raises Failed, Refused."""
        response, text = self._post(prompt, max_tokens)
        status = response.status_code
        if status == 400 and self._limit_name == "max_tokens" and "max_completion_tokens" in text:
            self._limit_name = "max_completion_tokens"  # the newer name, which some vendors insist on
            return self.complete(prompt, max_tokens)
        if status in _RETRIED or status >= 500:
            raise Failed(f"HTTP {status}: {text[:200]}", _retry_after(response.headers.get("Retry-After")))
        if status != 200:
            raise Refused(status, text, self.url)
        try:
            answer = json.loads(text)
            choice = answer["choices"][0]
            self._count(answer.get("usage"))
            self.model = str(answer.get("model") or "")
            return str(choice["message"]["content"] or ""), str(choice.get("finish_reason") or "")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failed(f"the body is not a chat completion ({type(error).__name__}): {text[:200]}") from None

    def _post(self, prompt: str, max_tokens: int) -> tuple[httpx.Response, str]:
        """The response and its body, whatever the status. Raises Failed without one."""
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._config.temperature,
            self._limit_name: max_tokens,
        }
        deadline = time.monotonic() + self._config.timeout
        body = b""
        try:
            # streamed, because httpx's own timeout starts again with every chunk
            with self._client.stream("POST", self.url, content=json.dumps(request)) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the reply took too long")
        except httpx.TimeoutException:
            raise Failed(f"time-out after {self._config.timeout:g} s") from None
        except httpx.RequestError as error:
            raise Failed(f"{type(error).__name__}: {error}") from None
        return response, body.decode("utf-8", "replace")

    def _count(self, usage: object) -> None:
        """Adds a reply's `usage`; not every endpoint sends it."""
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, dict) else 0
            prompt = usage.get("prompt_tokens")
            with self._lock:
                if isinstance(prompt, int) and isinstance(cached or 0, int):
                    self.stats = JudgeStats(self.stats.prompt_tokens + prompt, self.stats.cached_tokens + (cached or 0))

    def close(self) -> None:
        self._client.close()


def describe_refusal(config: EndpointConfig, error: Refused) -> str:
    setting = "judge.model.url" if error.url == completions_url(config.url) else "judge.model.replicas"
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
    """Seconds from a Retry-After header, which is a number or a date; None when it is neither."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
