"""Sampling loops in sigma space on a callable; what the host's samplers do not have.

story_gen.py  noise levels of StoryGen's references and the branches its guidance needs
inversion.py  DDIM inversion of a picture and its replay (StyleAligned, arXiv 2312.02133)
"""
