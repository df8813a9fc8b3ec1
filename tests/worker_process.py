"""A real Celery worker as a child process."""

import os
import sys
from pathlib import Path

from processes import ChildProcess

_TESTS = Path(__file__).parent
_DEFAULTS = ("-c", "1", "-l", "INFO", "--without-gossip", "--without-mingle")


class Worker(ChildProcess):
    """`celery -A app_module worker -n name@%h`, ready for tasks when the constructor returns.

    *options* come after the defaults (one prefork child, log level INFO) and so override them. The app is
    imported from *folder*, the tests' folder or the repository.
    """

    def __init__(
        self,
        app_module: str,
        name: str,
        *options: str,
        folder: Path,
        log_path: Path,
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        env = dict(env or {})
        path = [folder, _TESTS, _TESTS.parent, env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in dict.fromkeys(path) if entry)
        command = [sys.executable, "-m", "celery", "-A", app_module, "worker", "-n", f"{name}@%h"]
        # Once: by the first one, Celery decides whether it patches for gevent.
        pool = () if "-P" in options else ("-P", "prefork")
        super().__init__([*command, *pool, *_DEFAULTS, *options], log_path, env=env, cwd=folder)
        self.wait_until_ready(lambda: f"{name}@" in self.log() and " ready." in self.log(), timeout=60)
