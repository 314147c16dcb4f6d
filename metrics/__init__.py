"""Numbers on tensors: what is in a picture and how well it agrees with what was asked.

facts.py  reads kind, colour, hat, place, time, count and box of a picture-book page
"""
