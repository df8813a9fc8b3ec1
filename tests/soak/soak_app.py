"""What the workers of a soak run."""

from soak_tasks import Settings, new_app

app = new_app(Settings.from_environment())
