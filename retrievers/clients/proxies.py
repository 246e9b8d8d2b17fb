"""Which proxy stands between this process and a server, by the usual environment variables.

`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are read as curl and Python's urllib read them, but a server on this
machine is always asked directly: a proxy elsewhere cannot reach it.
"""

from __future__ import annotations

import ipaddress
import urllib.request
from collections.abc import Callable
from typing import TypeVar

import httpx

from retrievers.base import RetrieverError
from retrievers.secrets import public_url

_Client = TypeVar("_Client")


def proxy_for(url: str) -> str | None:
    """The URL of the proxy for a server's URL, or None where it is asked directly."""
    parsed = httpx.URL(url)
    if is_loopback(parsed.host) or urllib.request.proxy_bypass(parsed.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parsed.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def through(proxy: str | None) -> str:
    """The end of a message about a failed call: ` (through the proxy URL)` without the proxy's password, or nothing."""
    return "" if proxy is None else f" (through the proxy {public_url(proxy)}, which the environment names)"


def make_client(
    make: Callable[[], _Client], url: str, proxy: str | None, error: Callable[[str], Exception] = RetrieverError
) -> _Client:
    """Return what `make` returns, a client of httpx that uses `proxy`.

    Raises:
        Exception: what `error` makes, if httpx cannot use such a proxy.
    """
    try:
        return make()
    except (ImportError, ValueError) as problem:
        if proxy is None:
            raise
        raise error(
            f"{public_url(url)}: the proxy {public_url(proxy)}, which the environment names, cannot be used "
            f"({problem}); name another one in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or put {httpx.URL(url).host} into NO_PROXY"
        ) from problem
