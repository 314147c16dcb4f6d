"""One set of wrappers and one chained attention override per MODEL; every Storyweft block registers a rule with it.

A rule is an object with: node_id; `start(run)` -> its state of the run; `begin(run)`, once the entries are known;
`wants(layer, run)`; `attend(run, call, layout, q, k, v, attend)` -> [rows, heads, tokens, dim], or None to leave the
call alone; `expected(run)`, whether it should have acted, and `idle_reason(run)`, why it did not. Rules act in the order
they were added; two with one node_id are refused.
"""

from collections import Counter

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from . import families
from .layout import Layout
from .run import Run

KEY = "storyweft"
RULES = "storyweft_rules"


def rules_of(model) -> tuple:
    """Rules registered on a MODEL, in the order they act."""
    return model.model_options["transformer_options"].get(RULES, ())


def register(model, rule):
    """Clone of `model` with `rule` added. Raises ValueError for an unknown family or a second rule of the same node."""
    family = families.find(model, rule.node_id)
    if any(other.node_id == rule.node_id for other in rules_of(model)):
        raise ValueError(
            f"{rule.node_id}: this MODEL already carries a {rule.node_id} block; connect the model from before it "
            "(a story with several characters needs one block only)."
        )
    model = model.clone()
    options = model.model_options["transformer_options"]
    if RULES not in options:
        _install(model, family, options)
    options[RULES] = (*rules_of(model), rule)
    return model


def replace(model, old, new):
    """Clone of `model` in which the registered rule `old` is `new`."""
    model = model.clone()
    model.model_options["transformer_options"][RULES] = tuple(new if rule is old else rule for rule in rules_of(model))
    return model


def _install(model, family, options: dict) -> None:
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
    family.add_patches(model)
    options["optimized_attention_override"] = Override(options.get("optimized_attention_override"))


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    family = families.find(guider.model_patcher, "Storyweft")
    run = Run(options[RULES], family, tuple(noise.shape), sigmas.tolist())
    options[KEY] = run
    try:
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        del options[KEY]
    run.finish()
    return out


def _predict_noise(executor, x, timestep, model_options, seed):
    run = model_options["transformer_options"][KEY]
    run.begin_evaluation(float(timestep.flatten()[0]), executor.class_obj.conds)
    out = executor(x, timestep, model_options, seed)
    run.end_evaluation()
    return out


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    run = transformer_options.get(KEY)
    if run is None:
        raise RuntimeError(
            "Storyweft: the model was called outside a sampler that uses ComfyUI's guiders, so panels and steps are unknown; "
            "use KSampler or SamplerCustomAdvanced, or remove the Storyweft block."
        )
    call = Call(run, x, c_crossattn, transformer_options, kwargs)
    options = {**transformer_options, KEY: call}
    out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    call.close()
    return out


class Call:
    """One call of the diffusion model: its guidance chunks, and which attention of it comes next."""

    def __init__(self, run: Run, x: Tensor, text: Tensor | None, options: dict, kwargs: dict):
        self.run = run
        self.entries = run.chunk_entries(options["uuids"], options["cond_or_uncond"])
        self.shape = tuple(x.shape)
        self.text = text
        self.kwargs = kwargs
        rows = len(x) // len(self.entries)
        window = options.get("context_window")
        self.items = tuple(range(rows)) if window is None else families.window_items(window, rows)
        self.count: Counter = Counter()  # attention calls by whatever the family counts
        self.replaces = options.get("patches_replace", {}).get("attn1", {})
        self.mark = None  # what a family's patch saw just before the attention call
        self.inputs = None

    def close(self) -> None:
        self.run.family.close(self)


class Override:
    """The attention override: rules first, then whoever held the slot before, then the host's attention."""

    def __init__(self, previous):
        self.previous = previous

    def __call__(self, func, *args, **kwargs):
        call = (kwargs.get("transformer_options") or {}).get(KEY)
        if isinstance(call, Call):
            layout = call.run.family.locate(call, args, kwargs)
            if layout is not None:
                return self._through_rules(call, layout, func, args, kwargs)
        return self._base(func, args, kwargs)

    def _base(self, func, args, kwargs):
        return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)

    def _through_rules(self, call: Call, layout: Layout, func, args, kwargs):
        run = call.run
        run.reached.add(layout.layer)
        wanting = [rule for rule in run.rules if rule.wants(layout.layer, run)]
        if not wanting:
            return self._base(func, args, kwargs)
        attention = Attention(lambda *a, **k: self._base(func, a, k), args, kwargs)
        q, k, v = attention.tensors
        for rule in wanting:
            out = rule.attend(run, call, layout, q, k, v, attention)
            if out is not None:
                run.acted[rule] += 1
                return attention.as_called(out)
        return self._base(func, args, kwargs)


class Attention:
    """The attention that a host model asked for, callable on [rows, heads, tokens, dim] with other keys or fewer rows."""

    def __init__(self, base, args: tuple, kwargs: dict):
        self.base = base
        q, k, v, *rest = args
        self.kwargs = dict(kwargs)
        self.heads = rest[0] if rest else self.kwargs.pop("heads")
        self.bias = self._bias(rest[1] if len(rest) > 1 else self.kwargs.pop("mask", None), q)
        self.four = self.kwargs.pop("skip_reshape", False)
        self.keep = self.kwargs.pop("skip_output_reshape", False)
        self.tensors = tuple(self._by_heads(x) for x in (q, k, v))

    def _by_heads(self, x: Tensor) -> Tensor:
        if self.four:
            return x
        # SD3 hands v as [rows, tokens, heads, dim] beside flat q and k
        return (x if x.ndim == 4 else x.unflatten(-1, (self.heads, -1))).transpose(1, 2)

    @staticmethod
    def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
        """The host's mask as something to add to logits, [rows, heads or 1, Q or 1, K]."""
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, torch.finfo(q.dtype).min)
        if mask.ndim == 2:
            mask = mask[None]
        mask = mask if mask.ndim == 4 else mask[:, None]
        return mask.expand(len(q), *mask.shape[1:])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.base(q, k, v, self.heads, mask=bias, skip_reshape=True, skip_output_reshape=True, **self.kwargs)

    def as_called(self, out: Tensor) -> Tensor:
        """[rows, heads, tokens, dim] in the form the host model waits for."""
        return out if self.keep else out.transpose(1, 2).flatten(2)
