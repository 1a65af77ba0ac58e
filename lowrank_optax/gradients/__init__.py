"""Gradients inside the subspaces, by products with reverse rules of their own.

``value_and_grad`` is the entry. ``traced`` turns the function into a program, and
``program`` evaluates this program. ``layout`` spreads a projected gradient over the
axes of its parameter. ``leaves`` and ``followed`` are the parameters inside the
program. ``uses`` has the table of rules for operations; the rules are in ``moves``,
``pieces``, ``linear``, ``product``, ``ragged`` and ``lookups``. ``full_size`` serves
operations on whole arrays.
"""
