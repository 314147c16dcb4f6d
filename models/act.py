"""The ACT audio captioner (DCASE 2021, pp. 211-215) in its published layout: encoder, decoder, words and their probabilities.

Files name the tensors `encoder.*`, `encoder_linear`, `transformer_decoder.*`, `word_emb`, `dec_fc`. All sizes but the number
of heads follow from the shapes.
"""

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from ..attention.core import attend, merge_heads, split_heads
from .fused_attention import FusedAttention

HEAD, DECODER_HEADS = 64, 8  # width of an encoder's head, heads of the decoder, in every published file
STEPS = 30  # words of the authors' greedy captions, the end among them
QUEUE = 2000  # unfinished captions at which the best-first search gives up
DERIVED = ("pos_encoder.pe", "encoder.bn0.num_batches_tracked")  # what files may hold without it being a weight


class EncoderAttention(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, operations):
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * inner)
        self.proj = nn.Sequential(operations.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(merge_heads(attend(q, k, v)))


class EncoderFeed(nn.Module):
    def __init__(self, width: int, inner: int, operations):
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": operations.Linear(width, inner), "fc2": operations.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["fc2"](gelu(self.mlp["fc1"](x)))


class PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module, operations):
        super().__init__()
        self.norm = operations.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class Blocks(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = feed(attention(x))
        return x


class Encoder(nn.Module):
    """Features [n, frames, mels] -> class scores [n, 1 + frames / patch, classes] of every token, the class token first."""

    def __init__(self, sizes: Mapping[str, int], operations=nn):
        super().__init__()
        width, inner = sizes["width"], sizes["inner"]
        self.patch = sizes["patch"] // sizes["mels"]  # frames
        self.pos_embedding = nn.Parameter(torch.zeros(1, sizes["positions"], width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.bn0 = nn.BatchNorm2d(sizes["mels"])
        self.patch_embed = nn.ModuleDict({"proj": operations.Linear(sizes["patch"], width)})
        self.blocks = Blocks(
            [
                PreNorm(width, EncoderAttention(width, inner, sizes["heads"], operations), operations),
                PreNorm(width, EncoderFeed(width, sizes["feed"], operations), operations),
            ]
            for _ in range(sizes["depth"])
        )
        self.mlp_head = nn.Sequential(operations.LayerNorm(width), operations.Linear(width, sizes["classes"]))

    def normalised(self, features: Tensor) -> Tensor:
        return self.bn0(features.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    def patches(self, features: Tensor) -> Tensor:
        """Normalised features cut into patches of whole frames, time-major, and embedded."""
        return self.patch_embed["proj"](features.unflatten(1, (-1, self.patch)).flatten(2))

    def forward(self, features: Tensor) -> Tensor:
        patches = self.patches(self.normalised(features))
        x = torch.cat([self.cls_token.to(patches).expand(len(patches), -1, -1), patches], 1)
        return self.mlp_head(self.blocks(x + self.pos_embedding[:, : x.shape[1]].to(x)))


class DecoderLayer(nn.Module):
    """Post-norm layer of torch's TransformerDecoderLayer with exact GELU."""

    def __init__(self, width: int, feed: int, heads: int, operations):
        super().__init__()
        self.self_attn = FusedAttention(width, heads, operations)
        self.multihead_attn = FusedAttention(width, heads, operations)
        self.linear1 = operations.Linear(width, feed)
        self.linear2 = operations.Linear(feed, width)
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], past=None, bias: Tensor | None = None):
        """x [n, tokens, width] after `past` (keys, values) of earlier tokens -> the same, and keys and values so far."""
        own = self.self_attn.project(x)
        if past is not None:
            own = tuple(torch.cat([before, new], 2) for before, new in zip(past, own, strict=True))
        x = self.norm1(x + self.self_attn(x, *own, bias))
        x = self.norm2(x + self.multihead_attn(x, *memory))
        return self.norm3(x + self.linear2(gelu(self.linear1(x)))), own


class Decoder(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def sinusoid(start: int, count: int, width: int) -> Tensor:
    """Position table [count, width] from position `start`: sine in even columns, cosine in odd ones, base 10000."""
    place = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    angle = place * torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class ActCaptioner(nn.Module):
    """Features [n, frames, 64] in dB -> words; `words[0]` begins a caption and `end` is the number of the one that ends it."""

    def __init__(self, sizes: Mapping[str, int], words: Sequence[str], operations=nn):
        super().__init__()
        width, heads = sizes["memory"], sizes["decoder_heads"]
        self.words = tuple(words)
        self.begin, self.end = self.words.index("<sos>"), self.words.index("<eos>")
        self.encoder = Encoder(sizes, operations)
        self.encoder_linear = operations.Linear(sizes["classes"], width)
        self.transformer_decoder = Decoder(
            DecoderLayer(width, sizes["decoder_feed"], heads, operations) for _ in range(sizes["decoder_depth"])
        )
        self.word_emb = operations.Embedding(len(words), width)
        self.dec_fc = operations.Linear(width, len(words))

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Scores [n, tokens, words] of what follows each token [n, tokens], in one teacher-forced pass."""
        return self.logits(tokens, self.prepare(self.remember(features)))[0]

    def remember(self, features: Tensor) -> Tensor:
        """What the decoder looks at, [n, tokens, width]."""
        return relu(self.encoder_linear(self.encoder(features)))

    def prepare(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the memory for each decoder layer: they are the same for every word."""
        return [layer.multihead_attn.project(memory) for layer in self.transformer_decoder.layers]

    def logits(self, tokens: Tensor, memory: list, past: list | None = None) -> tuple[Tensor, list]:
        """Scores [n, tokens, words] of the word after each of `tokens` [n, tokens], which follow those kept in `past`."""
        start = 0 if past is None else past[0][0].shape[2]
        width = self.word_emb.weight.shape[1]
        x = self.word_emb(tokens) * math.sqrt(width)
        x = x + sinusoid(start, tokens.shape[1], width).to(x)
        seen = start + torch.arange(tokens.shape[1], device=x.device)
        allowed = torch.arange(start + tokens.shape[1], device=x.device) <= seen[:, None]
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill_(~allowed, -math.inf)
        kept = []
        for index, layer in enumerate(self.transformer_decoder.layers):
            x, own = layer(x, memory[index], None if past is None else past[index], bias)
            kept.append(own)
        return self.dec_fc(x), kept

    def greedy(self, memory: Tensor, steps: int = STEPS, stop: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens [n, 1 + steps] and the probability of each (0 for the first), the audio attention.

        stop: no more steps once every caption has ended; a caption's tokens after its end mean nothing.
        """
        tokens = torch.full((len(memory), 1), self.begin, device=memory.device)
        probability = torch.zeros(len(memory), 1, device=memory.device)
        prepared, past, ended = self.prepare(memory), None, torch.zeros(len(memory), dtype=torch.bool)
        for _ in range(steps):
            scores, past = self.logits(tokens[:, -1:], prepared, past)
            best, word = scores[:, -1].float().softmax(-1).max(-1, keepdim=True)
            tokens, probability = torch.cat([tokens, word], 1), torch.cat([probability, best], 1)
            ended |= word[:, 0].cpu() == self.end
            if stop and ended.all():
                break
        return tokens, probability

    def search(self, memory: Tensor, width: int) -> list[int]:
        """Best-first search of one caption, [1, tokens, width] -> its tokens; `width` children of every one looked at.

        The order is the mean log probability per word. Stops at the first caption that ends, or when more than 2000 wait.
        """
        prepared = self.prepare(memory)
        queue: list = [(0.0, 0, [self.begin], 0.0)]
        count = waiting = 1
        while waiting <= QUEUE:
            _, _, tokens, total = heapq.heappop(queue)
            if tokens[-1] == self.end and len(tokens) > 1:
                return tokens
            scores = self.logits(torch.tensor([tokens], device=memory.device), prepared)[0][0, -1]
            for score, word in zip(*(x.tolist() for x in scores.float().log_softmax(-1).topk(width)), strict=True):
                mean = (total + score) / (len(tokens) + 1e-6)
                heapq.heappush(queue, (-mean, count, [*tokens, word], total + score))
                count += 1
            waiting += width - 1
        return heapq.heappop(queue)[2]

    def read(self, tokens: Sequence[int], probabilities: Sequence[float]) -> tuple[list[str], list[float]]:
        """Words up to the end of one greedy caption and the probability of each, to 4 decimals as the authors keep it.

        A caption that did not end loses its last word to the end.
        """
        ids = list(tokens[1:])
        stop = ids.index(self.end) if self.end in ids else min(len(ids), STEPS - 1)
        return [self.words[i] for i in ids[:stop]], [round(float(p), 4) for p in probabilities[1 : stop + 1]]


def build(state: Mapping[str, Tensor], words: Sequence[str], source: str, heads=None, operations=nn) -> ActCaptioner:
    """The captioner of a file's tensors, loaded strictly; `heads` (encoder, decoder) where they are not the published.

    Raises ValueError naming the file for another kind of file, a vocabulary of another size, missing or unknown tensors.
    """
    tensors = {key: value for key, value in state.items() if key not in DERIVED}
    needed = ("encoder.pos_embedding", "encoder.blocks.layers.0.0.fn.qkv.weight", "word_emb.weight", "dec_fc.weight")
    for key in needed:
        if key not in tensors:
            raise ValueError(f"{source} is no ACT captioner: it lacks {key} (first: {', '.join(list(state)[:3])}).")
    count = tensors["word_emb.weight"].shape[0]
    if len(words) != count:
        raise ValueError(f"{source}: the vocabulary has {len(words)} words and word_emb.weight {count} rows.")
    if missing := [word for word in ("<sos>", "<eos>") if word not in words]:
        raise ValueError(f"{source}: the vocabulary has no {missing[0]}.")
    network = ActCaptioner(_sizes(tensors, heads), words, operations)
    own = network.state_dict()
    for key in own.keys() - DERIVED | tensors.keys():
        if key not in own or key not in tensors:
            raise ValueError(f"{source}: the tensor {key} is {'missing' if key in own else 'not known'}.")
        if own[key].shape != tensors[key].shape:
            raise ValueError(f"{source}: the tensor {key} is {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}.")
    tensors["encoder.bn0.num_batches_tracked"] = torch.tensor(0)
    network.load_state_dict(tensors, assign=True)
    return network.train(False).requires_grad_(False)


def _sizes(tensors: Mapping[str, Tensor], heads) -> dict[str, int]:
    """Every size of the network from the shapes in a file."""
    qkv = tensors["encoder.blocks.layers.0.0.fn.qkv.weight"].shape[0]
    memory, classes = tensors["encoder_linear.weight"].shape
    encoder_heads, decoder_heads = heads or (qkv // 3 // HEAD, DECODER_HEADS)
    return {
        "width": tensors["encoder.pos_embedding"].shape[2],
        "positions": tensors["encoder.pos_embedding"].shape[1],
        "mels": len(tensors["encoder.bn0.weight"]),
        "patch": tensors["encoder.patch_embed.proj.weight"].shape[1],
        "inner": qkv // 3,
        "heads": encoder_heads,
        "feed": tensors["encoder.blocks.layers.0.1.fn.mlp.fc1.weight"].shape[0],
        "depth": _layers(tensors, "encoder.blocks.layers."),
        "classes": classes,
        "memory": memory,
        "decoder_heads": decoder_heads,
        "decoder_feed": tensors["transformer_decoder.layers.0.linear1.weight"].shape[0],
        "decoder_depth": _layers(tensors, "transformer_decoder.layers."),
    }


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})
