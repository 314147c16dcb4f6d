"""Attention rules in pure torch: which token may look at which, and with what weight.

core.py         scaled dot-product attention as the default `attend`, head split and merge
masked.py       who may see whom by labels, as dense attentions of groups (PEEKABOO, arXiv 2312.07509)
joined.py       own tokens and pieces of other rows, each once
motion.py       predicted rows of each frame beside the prompt (StoryDiffusion)
branches.py     cross-attention as a weighted sum of separate softmaxes
story_gen.py    image attention beside the text's (StoryGen, arXiv 2306.00973)
style.py        StyleAligned: AdaIN over tokens, shared group norms, choice of layers (arXiv 2312.02133)
sound.py        weights of caption words, prompts scaled by them (arXiv 2309.02405)
consistent.py   Consistent Self-Attention (StoryDiffusion, arXiv 2405.01434)

Tensors are [rows, heads, tokens, dim]; `attend(q, k, v, bias)` computes attention and keeps that layout.
"""
