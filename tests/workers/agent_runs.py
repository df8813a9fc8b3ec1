"""What the tasks of `project` do that run an agent, with a model that says what it is told to."""

from agents import Agent, RunConfig, Runner

from examples.agent.model import Call, ScriptedModel
from mcp_celery.openai_agents import agents_server

QUIET = RunConfig(tracing_disabled=True)


def run_sync(task, conversation, question, turns):
    """Ask an agent *question* after *conversation*; it says *turns*, of which lists are calls of tools."""
    result = Runner.run_sync(agent_of(task, question, turns), after(conversation, question), run_config=QUIET)
    return result.to_input_list()


async def run(task, conversation, question, turns):
    """Do the same, for a task whose function is a coroutine function."""
    result = await Runner.run(agent_of(task, question, turns), after(conversation, question), run_config=QUIET)
    return result.to_input_list()


def agent_of(task, question, turns):
    script = {question: [turn if isinstance(turn, str) else [Call(*call) for call in turn] for turn in turns]}
    return Agent("tester", model=ScriptedModel(script), mcp_servers=[agents_server(task, cache_tools_list=True)])


def after(conversation, question):
    return [*conversation, {"role": "user", "content": question}]
