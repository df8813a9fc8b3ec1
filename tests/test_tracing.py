"""OpenTelemetry: what the MCP SDK does for a task belongs to the span of the task, on whatever thread it does it."""

import asyncio

import pytest
from calls import text_of
from celery import Celery
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mcp_celery import MCPTask
from mcp_celery.portal import close_portal


@pytest.fixture(scope="module")
def exporter():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # once a process
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield exporter
    instrumentor.uninstrument()
    provider.shutdown()


@pytest.fixture
def spans(exporter):
    """`spans()` returns the finished spans by name."""
    exporter.clear()
    return lambda: {span.name: span for span in exporter.get_finished_spans()}


@pytest.fixture
def app(recorded_peer):
    app = Celery("tracing", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.mcp_servers = {"peer": {"url": recorded_peer("python").url}}

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="plain")
    def plain(self):
        with trace.get_tracer("test").start_as_current_span("of the function"):
            return text_of(self.mcp.call_tool("echo", {"text": "x"}))

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="awaits")
    async def awaits(self):
        async def call():
            with trace.get_tracer("test").start_as_current_span("of the function"):
                return text_of(await self.amcp.call_tool("echo", {"text": "x"}))

        return (await asyncio.gather(call()))[0]

    yield app
    app.close()
    close_portal()


@pytest.mark.parametrize("name", ["plain", "awaits"])
def test_calls_are_children_of_what_is_current_in_the_task(app, spans, name):
    assert app.tasks[name].apply().get() == "x"
    by_name = spans()
    task, own, call = (by_name[of] for of in (f"run/{name}", "of the function", "MCP send tools/call echo"))
    assert own.parent.span_id == task.context.span_id
    assert call.parent.span_id == own.context.span_id
    opened = by_name["MCP send initialize"]
    assert opened.parent.span_id == own.context.span_id, "for the first call"
    assert {span.context.trace_id for span in by_name.values()} == {task.context.trace_id}


def test_calls_of_tasks_that_run_at_once_belong_each_to_its_own(app, exporter, spans):
    async def both():
        tasks = [app.tasks["awaits"], app.tasks["plain"]]
        return await asyncio.gather(*[asyncio.to_thread(task.apply) for task in tasks for _ in range(3)])

    assert [result.get() for result in asyncio.run(both())] == ["x"] * 6
    tasks = {span.context.trace_id for span in exporter.get_finished_spans() if span.name.startswith("run/")}
    calls = [span.context.trace_id for span in exporter.get_finished_spans() if span.name.endswith("tools/call echo")]
    assert len(tasks) == len(calls) == 6
    assert tasks == set(calls)
