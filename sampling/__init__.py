"""Sampling loops in sigma space on a callable; what the host's samplers do not have.

inversion.py  DDIM inversion of a picture and its replay (StyleAligned, arXiv 2312.02133)
multistep.py  DDIM and PLMS that a gradient can follow; sound_optimise.py  prompt weights tuned by it (arXiv 2309.02405)
"""
