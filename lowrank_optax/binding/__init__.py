"""Whose is what: which leaf, transformation, low-rank state and array belong together.

Everything else asks here: nothing else walks a state or recognises one.
"""
