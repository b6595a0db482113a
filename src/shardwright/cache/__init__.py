"""Memory of keys and values as numbers: which layers share blocks, who holds them, what prefixes they keep. No torch
here.
"""
