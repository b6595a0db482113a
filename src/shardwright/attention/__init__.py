"""Paged attention: what a step's attention needs to know, where keys and values lie, and the back ends that compute
it.
"""
