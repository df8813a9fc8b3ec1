"""What `make test-all` runs: the tests on each Python, with the newest and the oldest dependencies.

A Python that is not installed is skipped, and named at the end; where it was asked for with `-s` or `-p`, that fails.
"""

import os
import sys

import nox
from packaging.requirements import Requirement

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
#: Those that the package itself needs, and its extras. The tools of the tests are new in every session.
NEEDED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
#: Prints what is installed, and fails for what is not as required.
SHOW = """
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

required = [Requirement(line) for line in sys.argv[1:]]
names = dict.fromkeys(each.name for each in required)
print("Python", sys.version.split()[0], *(f"| {name} {version(name)}" for name in names))
sys.exit(", ".join(f"not {each}" for each in required if version(each.name) not in each.specifier) or 0)
"""

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.envdir = ".venv-nox"
nox.options.error_on_missing_interpreters = not {"-s", "--sessions", "-p", "--python"}.isdisjoint(sys.argv)


@nox.session(python=["3.11", "3.12", "3.13", "3.14", "3.15"])
def newest(session: nox.Session) -> None:
    """The newest of everything, on each Python."""
    run_tests(session, [])


@nox.session(python=["3.11"])
def oldest(session: nox.Session) -> None:
    """The oldest version that pyproject.toml allows of each dependency: all of them together."""
    run_tests(session, [lowest(requirement) for requirement in NEEDED])


@nox.session(name="celery-5.6", python=["3.12"])
def celery_before(session: nox.Session) -> None:
    """The last Celery 5.6 among the newest of all else."""
    run_tests(session, ["celery==5.6.*"])


def lowest(requirement: Requirement) -> str:
    """The requirement of the oldest version that *requirement* allows."""
    [bound] = [each.version for each in requirement.specifier if each.operator == ">="]
    return f"{requirement.name}=={bound}"


def run_tests(session: nox.Session, wanted: list[str]) -> None:
    """Install the project, the tools of its tests and what is *wanted*, and run the tests that are asked for.

    The session fails where what is wanted cannot be installed beside the rest.
    """
    session.install("--upgrade", "pip>=25.1")  # which knows groups
    session.install("--editable", ".", "--group", "test", *wanted)
    session.run("python", "-c", SHOW, *map(str, NEEDED), *wanted, log=False)
    jobs = os.environ.get("JOBS", "3")
    side_by_side = ["-n", jobs, "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run("python", "-m", "pytest", *side_by_side, *session.posargs)
