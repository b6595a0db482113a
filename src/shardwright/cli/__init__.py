"""The command line: one file per command, each a thin front of `LLM`, the server or the benchmarks."""
