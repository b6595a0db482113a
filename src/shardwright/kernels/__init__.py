"""Code for one kind of hardware. Each kernel has a pure-torch reference with the same signature, its fallback and its
oracle.
"""
