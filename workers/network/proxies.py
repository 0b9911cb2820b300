"""Which proxy of the environment a request to a server goes through, decided before a client is made.

An HTTP client that reads the environment itself builds the transports of all its proxies at once, and fails for one
that no request would use.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

from tasks.errors import ModelLoadError
from tasks.masking import without_password

_SOCKS = ("socks5", "socks5h")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy of the environment that requests to a server go through."""

    url: str
    variable: str
    """The variable that names it."""

    @property
    def words(self) -> str:
        """What a reason says of it."""
        return (
            f"; asked through the proxy {without_password(self.url)} ({self.variable}; NO_PROXY has the hosts that are "
            "asked without a proxy)"
        )


def proxy_for(url: str) -> Proxy | None:
    """The proxy that the environment has for a URL: HTTP_PROXY or HTTPS_PROXY by its scheme, else ALL_PROXY.

    Raises:
        ModelLoadError: A proxy that this environment cannot speak to is needed.
    """
    proxies = {scheme: found.strip() for scheme, found in getproxies().items()}
    parts = urlsplit(url)
    scheme = parts.scheme if proxies.get(parts.scheme) else "all"
    found = proxies.get(scheme)
    if not found or is_without_proxy(url, proxies):
        return None
    proxy = Proxy(_as_url(found), _variable(scheme, found))
    _check(proxy, url)
    return proxy


def is_without_proxy(url: str, proxies: dict[str, str]) -> bool:
    """Whether NO_PROXY has the host of a URL: its name, a domain above it, host:port, `*`, an address or a network."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    # Spaces part the names too, as curl has it.
    names = proxies.get("no", "").replace(",", " ").lower().split()
    hosts = [name.rpartition("://")[2].rstrip("/") for name in names]
    return any(_covers(name, host, port) for name in hosts)


def trusted_certificates() -> ssl.SSLContext | bool:
    """What an HTTP client that does not read the environment has to verify servers with."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        return ssl.create_default_context(cafile=file)
    return ssl.create_default_context(capath=folder) if folder else True


# --- private -------------------------------------------------------------------------------------


def _as_url(found: str) -> str:
    """The proxy as clients take it: without a scheme it speaks HTTP, and desktops write socks:// for SOCKS 5."""
    if "://" not in found:
        return f"http://{found}"
    if found.startswith("socks://"):
        return f"socks5://{found.removeprefix('socks://')}"
    return found


def _variable(scheme: str, found: str) -> str:
    name = f"{scheme}_proxy"
    return name if os.environ.get(name, "").strip() == found else name.upper()


def _check(proxy: Proxy, url: str) -> None:
    scheme = urlsplit(proxy.url).scheme
    where = f"{without_password(url)} would be asked through the proxy {without_password(proxy.url)} ({proxy.variable})"
    instead = "or put the host into NO_PROXY"
    if scheme in _SOCKS and importlib.util.find_spec("socksio") is None:
        raise ModelLoadError(
            f"{where}, which needs the package socksio on this worker: pip install socksio, {instead}"
        )
    if scheme not in (*_SOCKS, "http", "https"):
        raise ModelLoadError(
            f"{where}; a proxy has to be http://, https://, socks5:// or socks5h://, {instead}"
        )
    if not _has_host_and_port(proxy.url):
        raise ModelLoadError(
            f"{where}, which is no URL; write it as http://host:3128, {instead}"
        )


def _has_host_and_port(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Reading the port checks that it is a number.
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _covers(name: str, host: str, port: int | None) -> bool:
    """Whether an entry of NO_PROXY means this host."""
    if name == "*":
        return True
    bare, colon, number = name.rpartition(":")
    is_ipv6 = ":" in bare and not bare.startswith("[")
    if colon and number.isdigit() and not is_ipv6:
        if int(number) != port:
            return False
        name = bare
    name = name.strip("[]").removeprefix("*").removeprefix(".")
    return host == name or host.endswith(f".{name}") or _is_in_network(host, name)


def _is_in_network(host: str, name: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    except ValueError:  # names are no networks
        return False
