"""Reads servers over HTTP, all at the same time."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor.reading import Reading
from sglang_eplb_affinity.monitor.samples import Samples

MOST_AT_ONCE = 32


def base_url(text: str) -> str:
    """``host:port``, or a URL with or without ``/metrics``, as ``http://host:port``. Raises InputError."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/metrics")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")  # as the request will
        usable = parts.scheme in ("http", "https") and bool(host) and (parts.port or 1) > 0
        usable &= not (parts.query or parts.fragment) and not any(c.isspace() or not c.isprintable() for c in url)
    except ValueError:  # UnicodeError is one
        usable = False
    if not usable:
        raise InputError(f"{text}: is not the URL of a server, such as http://127.0.0.1:30000")
    return url


def read(url: str, timeout: float) -> Reading:
    """Raises InputError, one line that names the URL, when it cannot be read.

    The log line of the last round is left out where the server does not give it, as one that wants a key does.
    """
    text = _get(url, "/metrics", timeout)
    reading = Reading.of(url, time.time(), Samples.parse(text, f"{url}/metrics"))
    try:
        info = json.loads(_get(url, "/server_info", timeout))
    except (InputError, ValueError):
        return reading
    states = info.get("internal_states") if isinstance(info, dict) else None
    return reading.with_records(states if isinstance(states, list) else ())


def read_all(urls: Sequence[str], timeout: float) -> list[Reading | InputError]:
    """In the order of ``urls``."""

    def one(url: str) -> Reading | InputError:
        try:
            return read(url, timeout)
        except InputError as error:
            return error

    with ThreadPoolExecutor(min(len(urls), MOST_AT_ONCE)) as pool:
        return list(pool.map(one, urls))


def _get(url: str, path: str, timeout: float) -> str:
    try:
        with urllib.request.urlopen(url + path, timeout=timeout) as response:
            return str(response.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise InputError(f"{url}: has no {path}; start the server with --enable-metrics") from None
        raise InputError(f"{url}{path}: answers {error.code} {error.reason}") from None
    except TimeoutError:
        raise InputError(f"{url}: did not answer within {timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise InputError(f"{url}: did not answer within {timeout:g} s") from None
        raise InputError(f"{url}: not reachable ({_why(error.reason)}); is a server running there?") from None
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url}: broke off ({_why(error)})") from None


def _why(reason: object) -> str:
    return (getattr(reason, "strerror", None) or str(reason) or type(reason).__name__).lower()
