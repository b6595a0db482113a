"""The command line: one file per command, nothing here that `LLM`, the server or the benchmarks could not do by themselves."""
