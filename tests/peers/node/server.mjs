// A test server on the TypeScript SDK, with the map of sessions that its documentation shows:
// `node server.mjs PORT [--event-store] [--json]`, on 127.0.0.1.
import { randomUUID } from "node:crypto";
import { setTimeout as pause } from "node:timers/promises";
import { completable } from "@modelcontextprotocol/sdk/server/completable.js";
import { createMcpExpressApp } from "@modelcontextprotocol/sdk/server/express.js";
import { McpServer, ResourceTemplate } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import {
  CreateMessageResultSchema,
  ElicitResultSchema,
  isInitializeRequest,
  ListRootsResultSchema,
} from "@modelcontextprotocol/sdk/types.js";
import { z } from "zod";

const [port, ...options] = process.argv.slice(2);
let executed = 0;

/** Keeps the events of one session in memory. */
class Replay {
  #events = [];

  async storeEvent(streamId, message) {
    this.#events.push({ streamId, message });
    return String(this.#events.length);
  }

  async getStreamIdForEventId(eventId) {
    return this.#events[Number(eventId) - 1]?.streamId;
  }

  async replayEventsAfter(lastEventId, { send }) {
    const streamId = await this.getStreamIdForEventId(lastEventId);
    for (let position = Number(lastEventId); streamId && position < this.#events.length; position++) {
      const event = this.#events[position];
      // A priming event is stored as an empty message: its ID is all there is to it.
      if (event.streamId === streamId && event.message.jsonrpc) await send(String(position + 1), event.message);
    }
    return streamId;
  }
}

const text = (value) => ({ content: [{ type: "text", text: String(value) }] });

function offerState(server) {
  const variables = new Map();
  const input = { name: z.string() };
  server.registerTool("set_variable", { inputSchema: { ...input, value: z.string() } }, ({ name, value }) => {
    variables.set(name, value);
    return text("set");
  });
  server.registerTool("get_variable", { inputSchema: input }, ({ name }) => {
    if (!variables.has(name)) throw new Error(`${name} is not set in this session`);
    return text(variables.get(name));
  });
}

async function slow({ steps, seconds }, { _meta, sendNotification }) {
  executed += 1;
  for (let step = 1; step <= steps; step++) {
    await pause(seconds * 1000);
    if (_meta?.progressToken !== undefined) {
      const params = { progressToken: _meta.progressToken, progress: step, total: steps, message: `step ${step}` };
      await sendNotification({ method: "notifications/progress", params });
    }
  }
  return text("done");
}

function offerWork(server) {
  server.registerTool("echo", { inputSchema: { text: z.string() } }, async (input) => {
    await pause(Math.random() * 20);
    return text(input.text);
  });
  const numbers = { a: z.number().int(), b: z.number().int() };
  server.registerTool("add", { inputSchema: numbers, outputSchema: { result: z.number().int() } }, ({ a, b }) => ({
    ...text(a + b),
    structuredContent: { result: a + b },
  }));
  server.registerTool("slow", { inputSchema: { steps: z.number().int(), seconds: z.number() } }, slow);
  server.registerTool("executions", {}, () => text(executed));
  server.registerTool("fail", {}, () => {
    throw new Error("it failed");
  });
}

function offerQuestions(server) {
  // Each answer is shown as it came.
  const ask = async (extra, request, schema, show) => {
    try {
      return text(show(await extra.sendRequest(request, schema)));
    } catch (error) {
      return text(`refused: ${error.message}`);
    }
  };
  server.registerTool("ask_model", { inputSchema: { prompt: z.string() } }, ({ prompt }, extra) => {
    const messages = [{ role: "user", content: { type: "text", text: prompt } }];
    const request = { method: "sampling/createMessage", params: { messages, maxTokens: 10 } };
    return ask(extra, request, CreateMessageResultSchema, (result) => `${result.model}: ${result.content.text}`);
  });
  server.registerTool("ask_user", { inputSchema: { question: z.string() } }, ({ question }, extra) => {
    const requestedSchema = { type: "object", properties: { answer: { type: "string" } }, required: ["answer"] };
    const request = { method: "elicitation/create", params: { message: question, requestedSchema } };
    const show = ({ action, content }) => (action === "accept" ? `${action}: ${content.answer}` : action);
    return ask(extra, request, ElicitResultSchema, show);
  });
  server.registerTool("ask_roots", {}, (extra) =>
    ask(extra, { method: "roots/list" }, ListRootsResultSchema, ({ roots }) => roots.map(({ uri }) => uri).join(" ")),
  );
  server.registerTool("announce", {}, async ({ sendNotification }) => {
    for (const what of ["tools", "resources", "prompts"]) {
      await sendNotification({ method: `notifications/${what}/list_changed` });
    }
    return text("announced");
  });
  const said = { level: z.string(), text: z.string() };
  server.registerTool("say", { inputSchema: said }, async (input, { sendNotification, sessionId }) => {
    const params = { level: input.level, data: input.text.replace("{session}", sessionId) };
    await sendNotification({ method: "notifications/message", params });
    return text("said");
  });
}

function offerTexts(server) {
  const note = (uri, content) => ({ contents: [{ uri: uri.href, text: content }] });
  server.registerResource("hello", "note://hello", {}, (uri) => note(uri, "hello"));
  const people = new ResourceTemplate("note://people/{name}", { list: undefined });
  server.registerResource("person", people, {}, (uri, { name }) => note(uri, `a note on ${name}`));
  const names = (start) => ["Ada", "Alan", "Grace"].filter((name) => name.startsWith(start));
  server.registerPrompt("greet", { argsSchema: { name: completable(z.string(), names) } }, ({ name }) => ({
    messages: [{ role: "user", content: { type: "text", text: `Greet ${name}.` } }],
  }));
}

const transports = new Map();

async function openSession() {
  const transport = new StreamableHTTPServerTransport({
    sessionIdGenerator: () => randomUUID(),
    enableJsonResponse: options.includes("--json"),
    eventStore: options.includes("--event-store") ? new Replay() : undefined,
    onsessioninitialized: (sessionId) => transports.set(sessionId, transport),
  });
  transport.onclose = () => transports.delete(transport.sessionId);
  const server = new McpServer({ name: "typescript", version: "1.0.0" }, { capabilities: { logging: {} } });
  offerState(server);
  offerWork(server);
  offerQuestions(server);
  offerTexts(server);
  await server.connect(transport);
  return transport;
}

const refuse = (res, status, code, message) =>
  res.status(status).json({ jsonrpc: "2.0", error: { code, message }, id: null });

const app = createMcpExpressApp();
app.all("/mcp", async (req, res) => {
  const sessionId = req.headers["mcp-session-id"];
  let transport = transports.get(sessionId);
  if (!transport && sessionId) return refuse(res, 404, -32001, "Session not found");
  if (!transport && req.method === "POST" && isInitializeRequest(req.body)) transport = await openSession();
  if (!transport) return refuse(res, 400, -32000, "Bad Request: No valid session ID provided");
  await transport.handleRequest(req, res, req.body);
});
app.listen(Number(port), "127.0.0.1");
