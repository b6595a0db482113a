"""Benchmarks: standard workloads on `LLM`, each beside what the machine could do at best."""
