"""Who still holds a session that goes on in several branches of a workflow: a set of task IDs in Redis or Valkey.

A session that goes from step to step needs no store: who has nothing to pass it on to, ends it. Where one step passes
it on to several, each of them, and each that it passes on to in turn, is a holder. Whoever leaves the set empty ends
the session.

The store is never needed to go on: without an answer from it a session is left to the idle timeout of its server.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .exceptions import StoreError

if TYPE_CHECKING:
    from redis import Redis

#: How long the store may take, for a connection and for an answer. A task waits for it.
TIMEOUT_SECONDS = 2.0
#: How long the holders of a session are remembered after the last change.
TTL_SECONDS = 7 * 24 * 3600

#: KEYS: the holders of a session. ARGV: time to live in seconds, how many leave, those who leave, those who join.
#: Returns how many hold it then, or -1 where somebody leaves a set that is not there: it has expired, or the server was
#: flushed. Then nobody joins either, since a part of the holders would look like all of them.
_EXCHANGE_HOLDERS = """
local leaving = tonumber(ARGV[2])
if leaving > 0 and redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
for i = 3, 2 + leaving do redis.call('SREM', KEYS[1], ARGV[i]) end
for i = 3 + leaving, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return redis.call('SCARD', KEYS[1])
"""


class Store(Protocol):
    """Counts the holders of sessions. Each method is one atomic step and one round trip."""

    def pass_on(self, session: str, leaving: Sequence[str], joining: Sequence[str]) -> int | None:
        """Have the holders *leaving* (task IDs) give way to those *joining*; return how many hold *session* then.

        With nobody leaving, the counting of *session* (a hash of its ID) begins. None where it is not being counted:
        it never was, its time ran out, or the store was flushed.

        Raises:
            StoreError: The store did not answer.
        """
        ...


class RedisStore:
    """The store on Redis 6.2+ or Valkey. One key a session, with a time to live, so fit for a cluster."""

    def __init__(self, url: str, *, prefix: str = "mcp_celery") -> None:
        self._url = url
        self._prefix = prefix
        self._clients: dict[int, Redis] = {}

    def pass_on(self, session: str, leaving: Sequence[str], joining: Sequence[str]) -> int | None:
        """See `Store.pass_on`."""
        from redis import RedisError  # noqa: PLC0415 - only where branches are counted

        try:
            arguments: tuple[str | int, ...] = (TTL_SECONDS, len(leaving), *leaving, *joining)
            count = int(self._client().eval(_EXCHANGE_HOLDERS, 1, self._key(session), *arguments))
        except (RedisError, OSError, TypeError, ValueError) as exc:
            # TypeError and ValueError: an option of the URL that redis-py does not know.
            raise StoreError(f"The store did not answer ({type(exc).__name__})") from exc
        return None if count < 0 else count

    def _key(self, session: str) -> str:
        return f"{self._prefix}:{{{session}}}:holders"

    def _client(self) -> "Redis":
        """Return this process's client: connections may not be shared with a forked child."""
        from redis import Redis  # noqa: PLC0415 - only where branches are counted

        client = self._clients.get(os.getpid())
        if client is None:
            timeouts = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}
            client = self._clients[os.getpid()] = Redis.from_url(self._url, **timeouts)
        return client

    def __repr__(self) -> str:
        return f"<RedisStore {self._prefix}>"
