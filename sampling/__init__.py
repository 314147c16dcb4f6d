"""Sampling loops in sigma space on a callable; what the host's samplers do not have.

inversion.py        DDIM inversion of a picture and its replay (StyleAligned, arXiv 2312.02133)
schedule.py         levels of a discrete schedule, steps left out, the grid of DPM-Solver-fast
ddpm.py             ancestral steps with fixed large variance (MM-Diffusion, arXiv 2212.09478)
dpm_solver.py       DPM-Solver-fast of order 3 (arXiv 2206.00927)
cross_guidance.py   a joint model with one half known: replacement and gradient guidance (arXiv 2212.09478)
story_gen.py        noise levels of StoryGen's references and the branches its guidance needs
multistep.py, sound_optimise.py     DDIM and PLMS that a gradient can follow; prompt weights tuned by it (arXiv 2309.02405)
"""
