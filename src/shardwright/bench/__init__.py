"""Benchmarks: standard workloads on `LLM`, and loads at a server, each beside what the machine could do at best."""
