"""One set of wrappers and one chained attention override per MODEL; every Storyweft block registers a rule with it.

The rules of a model plan each attention call together (rule.py has their order, plan.py what they may change), and it is
computed once. Two rules of one node are refused unless the node says otherwise.
"""

import contextlib
import functools
from collections import Counter

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from . import families
from .layout import Layout
from .plan import CrossPlan, SelfPlan
from .rule import ORDER
from .run import Run

KEY = "storyweft"
RULES = "storyweft_rules"


class Idle:
    """Stands in for the run when no rule can change anything."""


def rules_of(model) -> tuple:
    """Rules registered on a MODEL, in the order they act."""
    return model.model_options["transformer_options"].get(RULES, ())


def register(model, rule):
    """Clone of `model` with `rule` added. Raises ValueError for an unknown family or a second rule of the same node."""
    family = families.find(model, rule.node_id)
    if not rule.several and any(other.node_id == rule.node_id for other in rules_of(model)):
        raise ValueError(
            f"{rule.node_id}: this MODEL already carries a {rule.node_id} block; connect the model from before it "
            "(a story with several characters needs one block only)."
        )
    missing = rule.kinds - family.kinds
    if rule.kinds and missing == rule.kinds:
        raise ValueError(
            f"{rule.node_id}: {family.model_class} has no {' or '.join(sorted(missing))}-attention that it could act on."
        )
    model = model.clone()
    options = model.model_options["transformer_options"]
    if RULES not in options:
        _install(model, family, options)
    options[RULES] = tuple(sorted((*rules_of(model), rule), key=_place))
    return model


def _place(rule) -> int:
    return ORDER.index(rule.node_id)


def replace(model, old, new):
    """Clone of `model` in which the registered rule `old` is `new`."""
    model = model.clone()
    model.model_options["transformer_options"][RULES] = tuple(new if rule is old else rule for rule in rules_of(model))
    return model


def without_rules(model):
    """Clone of `model` on which no Storyweft block acts."""
    model = model.clone()
    if rules_of(model):
        model.model_options["transformer_options"][RULES] = ()
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
    rules = tuple(rule for rule in options[RULES] if not rule.neutral)
    run = Run(rules, family, tuple(noise.shape), sigmas.tolist()) if rules else Idle()
    run.base, run.start, run.mask = guider.model_patcher.model, latent_image, _denoise_mask(*args, **kwargs)
    if any(rule.finished(run) for rule in rules):
        return latent_image
    options[KEY] = run
    try:
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        del options[KEY]
    if not rules:
        return out
    for rule in rules:
        out = rule.result(run, out)
    run.finish()
    return out


def _denoise_mask(denoise_mask=None, *args, **kwargs):
    return denoise_mask


def _predict_noise(executor, x, timestep, model_options, seed):
    run = model_options["transformer_options"][KEY]
    if isinstance(run, Idle):
        return executor(x, timestep, model_options, seed)
    run.begin_evaluation(float(timestep.flatten()[0]), executor.class_obj.conds)
    for rule in run.rules:
        x = rule.latents(run, x)
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
    if isinstance(run, Idle):
        options = {key: value for key, value in transformer_options.items() if key != KEY}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    call = Call(run, x, c_crossattn, transformer_options, kwargs)
    options = {**transformer_options, KEY: call}
    _chain_replaced(call, options)
    with contextlib.ExitStack() as stack:
        for rule in run.rules:
            rule.prepare(run, call, options)
            stack.enter_context(rule.around(run, call))
            control = control if control is None else rule.control(run, call, control)
        out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    call.close()
    return out


class Call:
    """One call of the diffusion model: its guidance chunks, and which attention of it comes next."""

    def __init__(self, run: Run, x: Tensor, text: Tensor | None, options: dict, kwargs: dict):
        self.run = run
        self.entries = run.chunk_entries(options["uuids"], options["cond_or_uncond"])
        self.window = options.get("context_window")
        self.shape = tuple(x.shape)
        self.text = text
        self.kwargs = kwargs
        rows = len(x) // len(self.entries)
        evolved = (options.get("ad_params") or {}).get("sub_idxs")  # AnimateDiff-Evolved's own context windows
        self.items = families.window_items(self.window, rows) if evolved is None else tuple(evolved)
        self.count: Counter = Counter()  # attention calls by whatever the family counts
        replaces = options.get("patches_replace", {})
        self.replaces = {"self": replaces.get("attn1", {}), "cross": replaces.get("attn2", {})}
        self.kinds = frozenset().union(*(rule.kinds for rule in run.rules))
        self.mark = None  # what a family's patch saw just before the attention call
        self.inputs = None
        self.queries = None  # input of a cross-attention's query projection, [rows, tokens, channels]
        self.after = None  # added to what the attention under way gives, after its output projection

    def bypass(self) -> None:
        """The attention announced by the mark did not come past the override."""
        layer, self.mark = self.mark.layer, None
        replaces = self.replaces.get(layer.kind, {})
        owner = replaces.get((layer.path, layer.block, layer.depth), replaces.get((layer.path, layer.block)))
        self.run.bypassed[layer] = "of an unknown pack" if owner is None else name_of(owner)

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
        return self._base(func, *args, **kwargs)

    def _base(self, func, *args, **kwargs):
        return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)

    def _through_rules(self, call: Call, layout: Layout, func, args, kwargs):
        run = call.run
        run.reached.add(layout.layer)
        wanting = [rule for rule in run.rules if rule.wants(layout.layer, run)]
        if not wanting:
            return self._base(func, *args, **kwargs)
        attention = Attention(functools.partial(self._base, func), args, kwargs)
        plan = make_plan(run, call, layout, wanting, attention)
        if plan is None:
            return self._base(func, *args, **kwargs)
        return attention.as_called(plan.run(attention, run.divisions))


def make_plan(run: Run, call: Call, layout: Layout, rules, attention):
    """The plan of one attention call after every rule has had its say; None when nobody changed it."""
    kind = CrossPlan if layout.layer.kind == "cross" else SelfPlan
    plan = kind(layout, *attention.tensors, attention.bias)
    acted = [rule for rule in rules if rule.plan(run, call, layout, plan)]
    run.acted.update(acted)
    return plan if acted else None


def _chain_replaced(call: Call, options: dict) -> None:
    """Put ourselves around other packs' attn2 replace patches, which leave the attention override out."""
    replaced = {
        key: Replaced(call, owner)
        for key, owner in call.replaces["cross"].items()
        for layer in call.run.family.cross_layers
        if key in ((layer.path, layer.block, layer.depth), (layer.path, layer.block))
        and any(rule.wants(layer, call.run) for rule in call.run.rules)
    }
    if replaced:
        patches = options["patches_replace"]
        options["patches_replace"] = {**patches, "attn2": {**patches["attn2"], **replaced}}


class Replaced:
    """Another pack's attn2 replace patch with the extra branches of our rules added to what it makes of the prompt."""

    def __init__(self, call: Call, owner):
        self.call = call
        self.owner = owner

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        run, call = self.call.run, self.call
        layout = run.family.locate(call, (q, k, v), {"transformer_options": extra})
        text = self.owner(q, k, v, extra)
        wanting = [] if layout is None else [rule for rule in run.rules if rule.wants(layout.layer, run)]
        if not wanting:
            return text
        run.reached.add(layout.layer)
        attention = Attention(optimized_attention, (q, k, v, extra["n_heads"]), {"transformer_options": extra})
        plan = make_plan(run, call, layout, wanting, attention)
        if plan is None:
            return text
        out = plan.run_replaced(attention.by_heads(text), attention, run.divisions)
        if out is None:
            raise RuntimeError(
                f"{run.names}: {layout.layer} is answered by the attn2 replace patch {name_of(self.owner)}, which cannot "
                "be told who sees which words; remove that node."
            )
        return attention.as_called(out)


def name_of(owner) -> str:
    """Module and name of another pack's patch, for messages."""
    kind = owner if hasattr(owner, "__qualname__") else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


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
        self.tensors = tuple(self.by_heads(x) for x in (q, k, v))

    def by_heads(self, x: Tensor) -> Tensor:
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
        return self.base(q, k, v, q.shape[1], mask=bias, skip_reshape=True, skip_output_reshape=True, **self.kwargs)

    def as_called(self, out: Tensor) -> Tensor:
        """[rows, heads, tokens, dim] in the form the host model waits for."""
        return out if self.keep else out.transpose(1, 2).flatten(2)
