"""Cross-attention with predicted frame embeddings (StoryDiffusion, arXiv 2405.01434, equation 7): one context, one softmax.

The rows of a frame's embedding stand after the prompt's and share its key and value weights. A separate softmax with
weights of its own, which published image adapters have, is a branch (apa.py).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .branches import Branch
from .masked import ANY, Constraint


def append_rows(branch: Branch, k: Tensor, v: Tensor) -> None:
    """Let a text branch look at k and v [n, heads, rows, dim] too, whatever its constraints say of the prompt."""
    more = k.shape[2]
    branch.k, branch.v = torch.cat([branch.k, k], 2), torch.cat([branch.v, v], 2)
    branch.constraints = [
        Constraint(c.query, pad(c.key, (0, more), value=ANY), c.name and (c.name, "frame rows", more))
        for c in branch.constraints
    ]
    if branch.bias is not None:
        branch.bias = pad(branch.bias, (0, more))


def frame_branch(k: Tensor, v: Tensor, frames: Tensor, query: Tensor, weight: float, name) -> Branch:
    """The branch of a model that holds all frames in one sequence: each query looks at the rows of its own frame.

    k, v [n, heads, frames * rows, dim]; frames [frames * rows] says whose they are, query [Q] which frame a query shows (ANY:
    none, such as the tokens of a reference picture, and it gets nothing). `name` stands for these labels.
    """
    shows = (query != ANY).to(k)[None, None, :, None]
    constraint = Constraint(query[None], frames[None], name)
    return Branch(slice(0, len(k)), k, v, weight * shows, [constraint])
