"""Asking a server over HTTP: one deadline for the whole exchange, a cap on what is read of it, and no key in any text that comes from it.

Nothing is trusted that comes back: it may drip, never end, unpack to gigabytes, break the protocol, or quote the key it was asked with.
Servers on this machine are asked without the environment's proxy.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import html
import ipaddress
import json
import re
import ssl
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

MAX_BODY = 4 * 2**20  # bytes of an answer, where the caller expects no more
MAX_ERROR = 2**16  # bytes that are read of one with another status than 200
CONNECT_SECONDS = 10.0  # for a connection, of the time of the whole exchange
HIDDEN = "[key]"  # what is shown in place of a key
SHOWN = 300  # characters of a server's text in a message

# What may be between the characters of a key that somebody writes over several lines, or tries to hide.
_GAP = r"(?:[\s\x00-\x1f\xad\u200b-\u200f\u2060\ufeff]|\\[nrt]){0,2}"
_LOOKED_AT = (
    2**18
)  # characters of a text of which SHOWN are shown: enough that no half of a key is at the end of what remains
# A terminal obeys these, and a report cannot show them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)|[\ud800-\udfff]")


class NoAnswer(Exception):
    """A server gave no answer that can be read: the message says why, without the key."""


class TooLate(NoAnswer):
    """Not the whole answer came in time."""


@dataclass(frozen=True)
class Answer:
    """text: of the body, wrong bytes as U+FFFD, as it came: `Http.shown` makes it fit for a message. headers: small names."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Http:
    """One server, asked in the event loop of the caller. key: sent as a bearer token; empty: none. connections: open at a time at most.
    direct: without a proxy of the environment."""

    def __init__(self, key: str = "", connections: int | None = None, direct: bool = False) -> None:
        self.direct = direct
        self._key = _forms(key)
        self._client = httpx.AsyncClient(
            # a compressed answer of a few kB can unpack to more than there is memory
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections or 64),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none are kept
            verify=_tls(),
            trust_env=not direct,
            follow_redirects=False,  # the key is for this server
        )

    async def ask(
        self, method: str, url: str, body: Any, timeout: float, most: int = MAX_BODY, limit: int = MAX_ERROR
    ) -> Answer:
        """body: becomes JSON; None: there is none. timeout: seconds for all of it. most: bytes of an answer of status 200; of
        others `limit` are read, and the rest is left. Raises NoAnswer, TooLate; never anything else."""
        content = None if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(timeout):
                return await self._ask(method, url, content, httpx.Timeout(None, connect=CONNECT_SECONDS), most, limit)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise TooLate(f"time-out after {timeout:g} s ({type(error).__name__})") from None
        except NoAnswer:
            raise
        except Exception as error:  # whatever a server makes of the protocol is its failure, and its alone
            raise NoAnswer(f"{type(error).__name__}: {self.shown(str(error))}") from None

    async def _ask(
        self, method: str, url: str, content: bytes | None, timeout: httpx.Timeout, most: int, limit: int
    ) -> Answer:
        headers = {} if content is None else {"Content-Type": "application/json"}
        async with self._client.stream(method, url, content=content, headers=headers, timeout=timeout) as response:
            good = response.status_code == 200
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            if encoding not in ("", "identity"):
                if good:
                    raise NoAnswer(f"the body is compressed ({self.shown(encoding, 20)}), though none was asked for so")
                text = ""
            elif response.status_code < 200:
                text = ""
            else:
                text = (await self._read(response, most if good else limit, good)).decode("utf-8", "replace")
            small = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status_code, text, small)

    async def _read(self, response: httpx.Response, most: int, whole: bool) -> bytes:
        """whole: more than `most` bytes are an error, and not left unread."""
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > most:
                if whole:
                    raise NoAnswer(f"the body is longer than {most:,} bytes")
                break
        return bytes(data[:most])

    def shown(self, value: object, most: int | None = SHOWN) -> str:
        """A value that a server sent as text for messages, files and screens: without the key in any of its forms, without control
        characters and lone surrogates (U+FFFD), cut to `most` characters."""
        if not isinstance(value, str):
            try:
                value = str(value)
            except (RecursionError, ValueError):
                value = f"a {type(value).__name__} too deep or too long to show"
        if most is not None:
            value = value[:_LOOKED_AT]
        if self._key is not None:
            value = self._key.sub(HIDDEN, value)
        return _CONTROL.sub("\ufffd", value)[:most]

    async def close(self) -> None:
        await self._client.aclose()


class BlockingHttp(Http):
    """Http for the threads of a pool. Thread-safe."""

    def __init__(self, key: str = "", connections: int | None = None, direct: bool = False) -> None:
        super().__init__(key, connections, direct)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def post(self, url: str, body: Any, timeout: float, most: int = MAX_BODY) -> Answer:
        """As `ask`."""
        asked = self.ask("POST", url, body, timeout, most)
        future: Future[Answer] = asyncio.run_coroutine_threadsafe(asked, self._loop)
        try:
            return future.result()
        except BaseException:  # an interrupt, for one
            future.cancel()
            raise

    def stop(self) -> None:
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reading the certificates takes a tenth of a second."""
    return httpx.create_ssl_context()


def read_json(text: str) -> Any:
    """Raises ValueError for what is none, with numbers or depths that Python does not read among it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def wrong_address(url: str) -> str:
    """Why a URL cannot be asked, such as a port that is no number; empty for one that can."""
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        return str(error)
    if address.port is not None and not 0 < address.port < 2**16:
        return f"there is no port {address.port}"
    return "" if address.host else "it has no host"


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine. HTTP_PROXY is not for such a one, and httpx, unlike others, would use it."""
    host = httpx.URL(url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def warn_of_plain_http(url: str, key: str, setting: str) -> None:
    """Where a key would go over a network as it is. setting: what names the URL."""
    if key and url.lower().startswith("http://") and not is_loopback(url):
        warnings.warn(
            f"{setting}: the key for {httpx.URL(url).host} is sent over plain http, where everybody on the way can read it; use https, "
            "or a tunnel to this machine",
            stacklevel=3,
        )


def _forms(key: str) -> re.Pattern[str] | None:
    """Finds a key in a text: as it is, escaped for a URL, JSON, Python or HTML, in hexadecimal, and inside anything in base64."""
    if not key:
        return None
    plain = _GAP.join(map(_escapes, key))
    if len(key) < 4:  # no secret, and a part of many words
        return re.compile(f"(?i:bearer{_GAP}{plain})")
    codes = [re.escape(part).replace(r"\+", "[+-]").replace("/", "[/_]") for part in _base64(key.encode())]
    return re.compile("|".join([f"(?i:{plain}|{key.encode().hex()})", *codes]))


def _escapes(letter: str) -> str:
    number = ord(letter)
    forms = [re.escape(letter), rf"\\u00{number:02x}", rf"\\x{number:02x}", f"%{number:02x}"]
    forms += [f"&#0*{number};", f"&#x0*{number:x};"]
    if not letter.isalnum():
        forms += [r"\\" + re.escape(letter), re.escape(html.escape(letter))]
    return f"(?:{'|'.join(forms)})"


def _base64(secret: bytes) -> Iterator[str]:
    """What is the same in every base64 text that holds the secret, after 0, 1 or 2 other bytes."""
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret).decode()
        part = text[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
        if len(part) >= 5:
            yield part
