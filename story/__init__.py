"""What a user writes, in plain Python.

script.py       characters, panel lines, captions, [NC] -> Story
selection.py    "1-4, id:Ana, rest" -> panel indices
transitions.py  frames of a film between story pictures
"""
