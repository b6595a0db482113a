"""Serve the model you trained, from the code you trained it with."""
