"""A decode step, watched once and carried out natively from then on.

Running a model's Python costs more than a decode's arithmetic. But what it computes for one token each of T sequences
is the same list of tensor operations every time. So a few steps are recorded, whatever code they come from; the lists
are compared, so that sizes are known as functions of T; and from then on one native call carries the list out.
"""
