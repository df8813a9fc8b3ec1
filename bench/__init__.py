"""What a resumed MCP call costs, beside what else one could do: run by `make bench`."""
