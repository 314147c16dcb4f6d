"""Sampling loops in sigma space on a callable; what the host's samplers do not have.

inversion.py  DDIM inversion of a picture and its replay (StyleAligned, arXiv 2312.02133)
"""
