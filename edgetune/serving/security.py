"""Who may ask: Host and Origin checks, CORS for named origins, and the API key.

A page of any web site can send requests to a server on the loopback address, and with DNS rebinding read the replies:
the browser then sends the site's own name as Host. So a Host that is a name must be a known one, and an Origin must be
that of the server itself or one that was named.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgetune.serving.api_errors import ApiError

_ANY_ORIGIN = "*"
_PREFLIGHT_SECONDS = "600"


@dataclass(frozen=True)
class AccessRules:
    """Which requests are answered."""

    hosts: frozenset[str] = frozenset()
    """Names, beside localhost and IP addresses, that a Host header may have; in lower case."""
    origins: frozenset[str] = frozenset()
    """Origins of web pages that may use the server; "*" permits all."""
    api_key: str | None = None
    """What each request must carry; None: nothing."""

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError if the Host header is a name that is not the server's (DNS rebinding)."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if not name or not (name == "localhost" or name in self.hosts or _is_address(name)):
            raise ApiError(403, f"the Host header {host!r} is not a name of this server (see --allow-host)")

    def check_origin(self, headers: Mapping[str, str], scheme: str) -> None:
        """Raise ApiError if a web page of another origin asks."""
        origin = headers.get("origin")
        if origin is None or self.permits_origin(origin):
            return
        if origin.lower() != f"{scheme}://{headers.get('host', '')}".lower():
            raise ApiError(403, f"pages of {origin!r} may not use this server (see --cors-origin)")

    def permits_origin(self, origin: str) -> bool:
        """Whether an origin was named."""
        return _ANY_ORIGIN in self.origins or origin in self.origins

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError unless the request carries the API key, as a bearer token or as x-api-key."""
        if self.api_key is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise ApiError(401, "no API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")

    def cors_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that let a named origin read the reply; none for any other."""
        origin = headers.get("origin")
        if origin is None or not self.permits_origin(origin):
            return {}
        return {"access-control-allow-origin": origin, "vary": "origin"}

    def preflight_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of the reply to a browser's preflight request. Raises ApiError for an unnamed origin."""
        found = self.cors_headers(headers)
        if not found:
            raise ApiError(403, f"pages of {headers.get('origin')!r} may not use this server (see --cors-origin)")
        return found | {
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
            "access-control-max-age": _PREFLIGHT_SECONDS,
        }


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
