"""Attention rules in pure torch: which token may look at which, and with what weight.

core.py         scaled dot-product attention as the default `attend`, head split and merge
consistent.py   Consistent Self-Attention (StoryDiffusion, arXiv 2405.01434)

Tensors are [rows, heads, tokens, dim]; `attend(q, k, v, bias)` computes attention and keeps that layout.
"""
