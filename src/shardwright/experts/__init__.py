"""Loops over experts in a model's own code: watched once, and then multiplied all together."""
