// Preloaded into a server that listens on all addresses and has no option for it: makes it listen on 127.0.0.1.
import net from "node:net";

const listen = net.Server.prototype.listen;

net.Server.prototype.listen = function listenOnLoopback(...args) {
  const callback = args.findLast((arg) => typeof arg === "function");
  const port = Number(typeof args[0] === "object" ? args[0].port : args[0]);
  if (!Number.isInteger(port)) throw new TypeError("only TCP ports are allowed here");
  return listen.call(this, { port, host: "127.0.0.1" }, callback);
};
