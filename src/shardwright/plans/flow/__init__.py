"""Follows a model's dataflow to what must be cut together: one recorded forward pass, and rules for its operations.

record      a forward pass on "meta" becomes a list of operations on places in memory
atoms       every index of every dimension of every parameter is an atom; which of them are bound to each other
memory      which atom each element of an intermediate tensor belongs to
propagate   goes through the operations, by the rules of elementwise, products, movements
settle      of what code divides in several, and of what several need: what is cut
collect     what is bound to each other becomes units and their groups
"""
