"""From checkpoint files to parameters: memory-mapped reading, name conversion, tied weights, errors that name what is
wrong.
"""
