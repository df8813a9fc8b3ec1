"""Questions to an agent, each a step of a workflow. The agent works in a notebook, whose variables live in one session.

What was said travels as the return value. What is in the notebook stays there: the session goes along by itself.
"""

import os
from typing import Any

from agents import Agent, Runner, set_tracing_disabled
from celery import Celery

from examples.agent.model import Call, ScriptedModel
from mcp_celery import MCPTask
from mcp_celery.openai_agents import agents_server

BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
NOTEBOOK_URL = os.environ.get("NOTEBOOK_URL", "http://127.0.0.1:8000/mcp")

app = Celery("agent", broker=BROKER_URL, backend=os.environ.get("CELERY_RESULT_BACKEND", BROKER_URL))
app.conf.mcp_servers = {"notebook": {"url": NOTEBOOK_URL}}
app.conf.result_extended = True  # results say on which worker they came about

DEPOSIT = "Put a balance of 1000 and a rate of 5 % into the notebook."
GROWTH = "Let the balance grow for ten years. How much interest is that?"
INSTRUCTIONS = """You work in a notebook, by its tools. It keeps variables, by name, and knows + - * / and no more.
Never calculate yourself. A simulation may last one second."""

#: What is said without a real model: to each question, calls of tools and then a text.
SCRIPT = {
    DEPOSIT: [
        [
            Call("assign", {"name": "balance", "expression": "1000"}),
            Call("assign", {"name": "rate", "expression": "0.05"}),
        ],
        "The notebook has them.",
    ],
    GROWTH: [
        [Call("assign", {"name": "start", "expression": "balance"})],
        [Call("simulate", {"name": "balance", "expression": "balance * (1 + rate)", "steps": 10, "seconds": 1})],
        [Call("evaluate", {"expression": "balance - start"})],
        "The interest is {}.",
    ],
}
HAS_REAL_MODEL = bool(os.environ.get("OPENAI_API_KEY"))
set_tracing_disabled(not HAS_REAL_MODEL)


@app.task(base=MCPTask, bind=True, mcp_server="notebook")
def ask(self, conversation: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    agent = Agent(
        "analyst",
        instructions=INSTRUCTIONS,
        model=None if HAS_REAL_MODEL else ScriptedModel(SCRIPT),  # None: the SDK's default
        mcp_servers=[agents_server(self, cache_tools_list=True)],
    )
    return Runner.run_sync(agent, [*conversation, {"role": "user", "content": question}]).to_input_list()
