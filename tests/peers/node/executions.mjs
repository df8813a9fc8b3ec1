// Preloaded into a server that keeps no log of what it executes: with `--executions PATH` it does, a line of JSON for the
// start and for the end of each execution. Its tools then do not say that they may be called again.
import { appendFileSync } from "node:fs";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";

const option = process.argv.indexOf("--executions");
const path = option < 0 ? null : process.argv[option + 1];
const registerTool = McpServer.prototype.registerTool;

function note(what, args) {
  const marker = String(args?.message ?? args?.duration);
  appendFileSync(path, JSON.stringify({ what, marker, server: process.pid }) + "\n");
}

if (path !== null) {
  McpServer.prototype.registerTool = function registerLoggedTool(name, { annotations, ...config }, callback) {
    return registerTool.call(this, name, config, async (args, extra) => {
      note("start", args);
      try {
        return await callback(args, extra);
      } finally {
        note("end", args);
      }
    });
  };
}
