"""Servers on this machine: they are asked without the environment's proxy."""

from __future__ import annotations

import ipaddress

import httpx


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine. HTTP_PROXY is not for such a one, and httpx, unlike others, would use it."""
    host = httpx.URL(url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
