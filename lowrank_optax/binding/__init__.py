"""Bindings: which leaf, transformation, low-rank state and array belong together.

No other room of the library walks a state or recognises low-rank states.
"""
