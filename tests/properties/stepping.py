"""The steps as an app of real workers, which share a journal with the test."""

import os

from journal import SharedJournal
from steps import new_app

app = new_app(
    os.environ["BROKER"],
    os.environ["BROKER"],
    os.environ["PEER"],
    SharedJournal(os.environ["BROKER"]).append,
    pause=lambda: None,
    has_sessions=True,
)
