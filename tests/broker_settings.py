"""Settings of Celery with which workers soon go on after one of them was killed or has lost its broker."""

#: Redis. Kombu looks for lost messages every 100 seconds, and for 5 minutes not at all where a worker died doing so.
LOOKS_SOON = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 2}

#: RabbitMQ. Or a worker of Celery 5.7 ends with RESOURCE_LOCKED that is back before the broker knows that it was gone.
CONTROL_QUEUE_STAYS_FREE = {"control_queue_exclusive": False, "control_queue_durable": True}
