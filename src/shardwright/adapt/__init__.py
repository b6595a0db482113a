"""The user's module becomes a served module: its attention is captured, and what it asks for is found out by running
it.
"""
