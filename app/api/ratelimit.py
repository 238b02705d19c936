"""Rate limits: so many requests of a kind per key and window, counted in the broker for all api
processes together.

Headers as draft-ietf-httpapi-ratelimit-headers-10 has them. Where the broker does not answer,
nobody is refused.
"""

import logging
import math
import time
from dataclasses import dataclass

from fastapi import Request
from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from app.api.access import READING
from app.config import Settings
from app.errors import ServiceError

log = logging.getLogger(__name__)
UPLOADS = ("/v1/models", "/v1/datasets", "/v1/uploads", "/v1/analyze")
# How long the broker is not asked after it did not answer: requests must not wait for it.
PAUSE_S = 5.0
TIMEOUT_S = 0.25


@dataclass(frozen=True)
class Standing:
    """Where somebody stands with a policy, after a request."""

    policy: str
    limit: int
    window_s: int
    allowed: bool
    remaining: int
    reset_s: int

    def headers(self) -> dict[str, str]:
        found = {
            "RateLimit-Policy": f'"{self.policy}";q={self.limit};w={self.window_s}',
            "RateLimit": f'"{self.policy}";r={self.remaining};t={self.reset_s}',
        }
        return found if self.allowed else found | {"Retry-After": str(self.reset_s)}


class RateLimiter:
    """Counts requests in sliding windows (a weighted sum of this window and the last)."""

    def __init__(self, settings: Settings) -> None:
        self.policies: dict[str, RateLimitItem] = {
            "reads": parse(settings.rate_limit_reads),
            "writes": parse(settings.rate_limit_writes),
            "uploads": parse(settings.rate_limit_uploads),
            "strangers": parse(settings.rate_limit_strangers),
        }
        self._silent_until = 0.0
        self._told = False
        options = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        # kombu says redis+socket where the limiter says redis+unix.
        url = settings.broker.replace("redis+socket://", "redis+unix://")
        storage = RedisStorage(
            f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="litesmith-rate",
            **options,
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def hit(self, policy: str, who: str) -> Standing | None:
        """Count a request; None where the counter does not answer."""
        if time.monotonic() < self._silent_until:
            return None
        item = self.policies[policy]
        try:
            allowed = await self._limiter.hit(item, policy, who)
            stats = await self._limiter.get_window_stats(item, policy, who)
        except (StorageError, OSError) as error:
            self._silent_until = time.monotonic() + PAUSE_S
            if not self._told:
                self._told = True
                log.error("rate limits are off: no broker", extra={"error": str(error)})
            return None
        if self._told:
            self._told = False
            log.info("rate limits are on again")
        return Standing(
            policy,
            item.amount,
            item.get_expiry(),
            allowed,
            max(0, stats.remaining),
            max(1, math.ceil(stats.reset_time - time.time())),
        )


def policy_of(request: Request) -> str:
    """Which policy a request falls under. A stream or a waiting poll is one read, and so is a piece
    of a resumable upload: that was counted when it began."""
    method, path = request.method, request.scope["route"].path
    piece = method == "PATCH" and path.startswith("/v1/uploads/")
    if method in ("GET", "HEAD") or piece or (method, path) in READING:
        return "reads"
    if method in ("POST", "PUT") and path.startswith(UPLOADS):
        return "uploads"
    form = request.headers.get("content-type", "").startswith("multipart/form-data")
    return "uploads" if form else "writes"


async def limited(request: Request) -> None:
    """Count the request of whoever was let in. ServiceError 429 `rate_limited`.

    `request.state.rate` keeps the standing, for the headers of the answer.
    """
    limiter: RateLimiter | None = request.app.state.limiter
    principal = getattr(request.state, "principal", None)
    if limiter is None or principal is None:
        return
    who = principal.key_id or f"tenant:{principal.tenant_id}"
    _judge(request, await limiter.hit(policy_of(request), who))


async def stranger(request: Request) -> None:
    """Count a request without a valid key, by address. ServiceError 429 `rate_limited`."""
    limiter: RateLimiter | None = request.app.state.limiter
    if limiter is not None:
        address = request.client.host if request.client else "unknown"
        _judge(request, await limiter.hit("strangers", address))


def _judge(request: Request, standing: Standing | None) -> None:
    if standing is None:
        return
    request.state.rate = standing
    if not standing.allowed:
        raise ServiceError(
            429,
            "rate_limited",
            f"More than {standing.limit} {standing.policy} in {standing.window_s} s.",
            f"Try again in {standing.reset_s} s. To follow a job use ?wait= or its events:"
            " either is one request.",
        )
