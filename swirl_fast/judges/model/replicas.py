"""All endpoints of one model: which of them a request goes to, its tries, and what happens where one is dead.

A request goes to the endpoint with the fewest under way. Requests that share a long beginning go to the same one as long as that has no
more than its share of what may be under way, for it has read the beginning already (a prefix cache).

An endpoint that fails is left out for 30 s, twice as long each further time, 5 minutes at most (or as long as it asks for); then one
request tries it. What it failed at goes to the others at once. Only when all have failed does a request wait and use up `retries`, and
where all are left out they are asked nevertheless: with one endpoint there is nothing else to do.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from swirl_fast.config import ConfigError, EndpointConfig
from swirl_fast.judges.judge import NO_REPLY
from swirl_fast.judges.model.endpoint import (
    Call,
    Endpoint,
    Failed,
    Refused,
    Reply,
    back_off,
    completions_url,
    describe_refusal,
)
from swirl_fast.verdict import JudgeStats

REST = 30.0  # seconds for which an endpoint is left out when it failed
MAX_REST = 300.0
CHECK = ("Reply with the one word: ready", 16)  # prompt and tokens


@dataclass(eq=False)
class _Replica:
    """asked: number of the last request that went there. failures: in a row. until: of the clock, when it is tried again. warned: of this
    time of being left out."""

    endpoint: Endpoint
    under_way: int = 0
    asked: int = 0
    failures: int = 0
    until: float = 0.0
    warned: bool = False

    def usable(self, now: float) -> bool:
        return not self.failures or (now >= self.until and not self.under_way)


class Endpoints:
    """Thread-safe. clock: seconds. Raises ConfigError for an impossible address or key, and for an address that is named twice."""

    def __init__(self, config: EndpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        named = [("judge.model.url", config.url), *(("judge.model.replicas", url) for url in config.replicas)]
        for i, (_, url) in enumerate(named):
            if completions_url(url) in [completions_url(other) for _, other in named[:i]]:
                raise ConfigError(f"judge.model.replicas={config.replicas}: names {url} twice; name each endpoint once")
        self._config = config
        self._clock = clock
        self._replicas: list[_Replica] = []
        self._lock = threading.Lock()
        self._asked = 0
        try:
            for setting, url in named:
                self._replicas.append(_Replica(Endpoint(config, url, setting)))
        except ConfigError:
            self.close()
            raise

    def check(self) -> None:
        """Asks every endpoint for a few tokens. Warns of one that does not answer where another does; raises ConfigError, with the remedy,
        where none answers, after `retries` more tries, or one refuses."""
        rounds = 1 + max(0, self._config.retries)
        for attempt in range(rounds):
            try:
                silent = self._silent()
            except Refused as error:
                raise ConfigError(describe_refusal(self._config, error)) from None
            if len(silent) < len(self._replicas):
                break
            if attempt + 1 < rounds:
                Call().wait(back_off(attempt, min(error.wait or 0.0 for error in silent.values())))
        else:
            raise ConfigError(self._describe_silence(silent, rounds))
        for replica, failure in silent.items():
            self._warn(replica, failure)
        self._compare_models()

    def _silent(self) -> dict[_Replica, Failed]:
        """Those that do not answer now, all being asked at the same time. Raises Refused."""

        def failure(replica: _Replica) -> Failed | None:
            with self._lock:
                self._counted(replica)
            try:
                self._ask(replica, *CHECK)
            except Failed as error:
                return error
            return None

        if len(self._replicas) == 1:
            found = [failure(self._replicas[0])]  # in this thread, where Ctrl-C ends it
        else:
            with ThreadPoolExecutor(len(self._replicas), "judge-check") as pool:
                found = list(pool.map(failure, self._replicas))
        return {replica: error for replica, error in zip(self._replicas, found, strict=True) if error is not None}

    def _describe_silence(self, silent: dict[_Replica, Failed], tries: int) -> str:
        each = [
            f"{one.endpoint.url} does not answer: {NO_REPLY} in {tries} tries, the last: {failure}"
            for one, failure in silent.items()
        ]
        long_enough = f"is judge.model.timeout ({self._config.timeout:g} s) long enough?"
        if len(each) == 1:
            return f"the judge's endpoint {each[0]}. Is a server running there (judge.model.url), and {long_enough}"
        return (
            f"none of the judge's endpoints answers: {'; '.join(each)}. Are servers running there (judge.model.url, "
            f"judge.model.replicas), and {long_enough}"
        )

    def _compare_models(self) -> None:
        """Some servers say what they serve."""
        models = {one.endpoint.url: one.endpoint.model for one in self._replicas if one.endpoint.model}
        if len(set(models.values())) > 1:
            listed = "; ".join(f"{url} says {model}" for url, model in models.items())
            warnings.warn(
                f"the judge's endpoints seem to serve different models: {listed}. Verdicts are kept under one name, so "
                "judge.model.replicas must serve the model of judge.model.url",
                stacklevel=3,
            )

    def complete(self, prompt: str, call: Call, max_tokens: int, group: str = "", beginning: str = "") -> Reply:
        """One completion. group: the same for prompts that share a long beginning. beginning: of the reply. Raises Failed when all tries
        failed or the call is stopped, Refused."""
        rounds = 1 + max(0, self._config.retries)
        tries, last, wait = 0, "", None
        for attempt in range(rounds):
            failed: list[_Replica] = []
            while (replica := self._next(call, group, failed)) is not None:
                if call.stopped.is_set():
                    self._end(replica)
                    raise Failed(call.reason)
                tries += 1
                try:
                    return self._ask(replica, prompt, max_tokens, beginning)
                except Failed as error:
                    self._warn(replica, error)
                    last, wait = self._named(replica, error), error.wait
                    failed.append(replica)
            if attempt + 1 < rounds:
                call.wait(back_off(attempt, wait))
        raise Failed(f"{NO_REPLY} in {tries} tries, the last: {last}")

    def _next(self, call: Call, group: str, failed: Sequence[_Replica]) -> _Replica | None:
        """The endpoint that a request goes to, with the request counted. failed: those that failed at it since it last waited. None: no
        other is left."""
        with self._lock:
            now = self._clock()
            usable = [one for one in self._replicas if one not in failed and one.usable(now)]
            if usable:
                chosen = self._of_group(call, group, usable)
            elif failed:
                return None
            else:
                chosen = min(self._replicas, key=_load)
            self._counted(chosen)
            return chosen

    def _of_group(self, call: Call, group: str, usable: Sequence[_Replica]) -> _Replica:
        home = call.homes.get(group)
        known = next((one for one in usable if one.endpoint is home), None)
        if known is not None and known.under_way < math.ceil(self._config.concurrency / len(usable)):
            return known
        chosen = min(usable, key=_load)
        if known is None:
            call.homes[group] = chosen.endpoint
        return chosen

    def _counted(self, replica: _Replica) -> None:
        self._asked += 1
        replica.under_way += 1
        replica.asked = self._asked

    def _end(self, replica: _Replica) -> None:
        with self._lock:
            replica.under_way -= 1

    def _ask(self, replica: _Replica, prompt: str, max_tokens: int, beginning: str = "") -> Reply:
        """One try, which was counted. An answer, also a refusal, ends the time of being left out."""
        try:
            reply = replica.endpoint.complete(prompt, max_tokens, beginning)
        except Failed as error:
            self._leave_out(replica, error)
            raise
        except Refused:
            self._let_in(replica)
            raise
        finally:
            self._end(replica)
        self._let_in(replica)
        return reply

    def _let_in(self, replica: _Replica) -> None:
        with self._lock:
            replica.failures, replica.warned = 0, False

    def _leave_out(self, replica: _Replica, error: Failed) -> None:
        with self._lock:
            now = self._clock()
            # one failure of a server is that of all requests which were under way there
            if not replica.failures or now >= replica.until:
                rest = REST * 2 ** min(replica.failures, 10) if error.wait is None else error.wait
                replica.until = now + min(rest, MAX_REST)
                replica.failures += 1

    def _warn(self, replica: _Replica, error: Failed) -> None:
        """Once, until it answers again; nothing where there are no others."""
        with self._lock:
            if len(self._replicas) == 1 or replica.warned:
                return
            replica.warned = True
        warnings.warn(
            f"the judge's endpoint {replica.endpoint.url} fails: {error}. It is left out, and tried again later",
            stacklevel=2,
        )

    def _named(self, replica: _Replica, error: Failed) -> str:
        return str(error) if len(self._replicas) == 1 else f"{replica.endpoint.url}: {error}"

    def stats(self) -> JudgeStats:
        """Of all endpoints together."""
        each = [replica.endpoint.stats for replica in self._replicas]
        return JudgeStats(sum(one.prompt_tokens for one in each), sum(one.cached_tokens for one in each))

    def close(self) -> None:
        for replica in self._replicas:
            replica.endpoint.close()


def _load(replica: _Replica) -> tuple[int, int]:
    """What is chosen by: the fewest under way, of these the one that was not asked for longest."""
    return replica.under_way, replica.asked
