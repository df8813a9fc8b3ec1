"""How a Redis broker gives the messages of a worker that was killed to others soon."""

#: Kombu looks for lost messages every 100 seconds, and for 5 minutes not at all where a worker died doing so.
LOOKS_SOON = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 2}
