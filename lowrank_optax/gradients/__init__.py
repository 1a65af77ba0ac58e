"""Gradients inside the subspaces: products whose reverse rules are others.

``value_and_grad`` is the door, ``traced`` and ``program`` the function as operations.
``layout`` spreads a projected gradient over the axes of its parameter, ``leaves`` and
``followed`` are what goes through the program, and ``uses`` names the rule of each
operation: ``moves``, ``pieces``, ``linear``, ``product``, ``ragged``, ``lookups``, and
``full_size`` for all that takes the array as it is.
"""
