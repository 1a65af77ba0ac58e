"""The figures of the documentation, and the scripts that measure and draw them.

python -m docs.figures            # draws all of them anew
python -m docs.figures.states     # trains a small model and measures its states
"""
