"""What decides a picture, as a hash: settings, tensors, weights, and the patches that other nodes put on a model.

Functions are told apart by their code and by what they hold on to; modules and ControlNets by a few values of each
weight. What cannot be told apart this way is named in `unknown`, and then the hash says nothing.
"""

import functools
import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

import comfy.controlnet
import comfy.weight_adapter
import torch
from torch import Tensor

PACK = __name__.rpartition(".")[0].rpartition(".")[0]  # package name of the pack, whatever its folder is called
PLAIN = (str, int, float, bool, bytes, complex, type(...), Enum, torch.dtype, torch.device)
SKIPPED = ("uuid", "storyweft_story")  # made anew at every run; what a panel takes of its story stands in the prompt
CONTROL = (
    "cond_hint_original",
    "strength",
    "strength_type",
    "timestep_percent_range",
    "global_average_pooling",
    "extra_concat_orig",
    "extra_args",
    "previous_controlnet",
)
SAMPLES = 16  # values that stand for a weight


class Digest:
    """Feed it values in a fixed order; equal contents give equal `text`."""

    def __init__(self):
        self._hash = hashlib.sha256()
        self._open: list[int] = []  # values being fed, so that a circle ends
        self.unknown: set[str] = set()

    @property
    def text(self) -> str:
        return self._hash.hexdigest()[:40]

    def feed(self, value) -> None:
        if value is None or isinstance(value, PLAIN):
            self._say(repr(value))
        elif torch.is_tensor(value):
            self._say(f"{value.dtype}{tuple(value.shape)}")
            self._hash.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif id(value) in self._open:
            self._say("circle")
        else:
            self._open.append(id(value))
            self._feed_parts(value)
            self._open.pop()

    def feed_weight(self, weight: Tensor) -> None:
        """Shape and a few values, for tensors too large to be read whole."""
        self._say(f"{tuple(weight.shape)}")
        flat = weight.detach().flatten()
        if len(flat):
            self.feed(flat[torch.linspace(0, len(flat) - 1, SAMPLES, device=flat.device).long()].float())

    def _say(self, text: str) -> None:
        self._hash.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))

    def _feed_parts(self, value) -> None:
        if isinstance(value, Mapping):
            self._feed_mapping(value)
        elif isinstance(value, (list, tuple)):
            self._say(f"{len(value)} items")
            for item in value:
                self.feed(item)
        elif isinstance(value, (set, frozenset)):
            self.feed(sorted(value, key=str))
        elif isinstance(value, type):
            self._say(_name(value))
        elif is_dataclass(value):
            self.feed([_name(type(value)), *(vars(value)[field.name] for field in fields(value))])
        elif isinstance(value, torch.nn.Module):
            self._feed_module(value)
        elif isinstance(value, comfy.controlnet.ControlBase) and type(value).__module__ == "comfy.controlnet":
            self._feed_control(value)
        elif isinstance(value, functools.partial):
            self.feed([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self.feed([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._feed_function(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self._say(_name(value))
        elif type(value).__module__.startswith(f"{PACK}."):
            self.feed([_name(type(value)), vars(value)])
        else:
            self.unknown.add(type(value).__qualname__)

    def _feed_mapping(self, value: Mapping) -> None:
        kept = [key for key in sorted(value, key=str) if key not in SKIPPED]
        self._say(f"{len(kept)} entries")
        for key in kept:
            self._say(str(key))
            self.feed(value[key])

    def _feed_module(self, module: torch.nn.Module) -> None:
        self.feed([base.__name__ for base in type(module).__mro__])  # core mixes model samplings from classes
        self.feed({name: value for name, value in vars(module).items() if isinstance(value, PLAIN) and name != "training"})
        for name, weight in sorted(module.state_dict().items()):
            self._say(name)
            self.feed_weight(weight)

    def _feed_control(self, control) -> None:
        self._say(_name(type(control)))
        self.feed([vars(control)[name] for name in CONTROL])
        networks = [vars(control)[name] for name in ("control_model", "t2i_model") if name in vars(control)]
        self.feed([network for network in networks if network is not None])
        for name, weight in sorted(vars(control).get("control_weights", {}).items()):  # of a ControlLora, not yet a network
            self._say(name)
            self.feed_weight(weight)

    def _feed_function(self, function: types.FunctionType) -> None:
        self._say(_name(function))
        if not function.__module__.startswith(f"{PACK}."):
            self._feed_code(function.__code__)
        self.feed([function.__defaults__, function.__kwdefaults__])
        self.feed([cell.cell_contents for cell in function.__closure__ or ()])


    def _feed_code(self, code: types.CodeType) -> None:
        self.feed([code.co_code, code.co_names])
        for constant in code.co_consts:
            self._feed_code(constant) if isinstance(constant, types.CodeType) else self.feed(constant)


def _name(value) -> str:
    return f"{(value.__module__ or '').removeprefix(PACK)}.{value.__qualname__}"


def fingerprint(model) -> str:
    """Hash of a MODEL's class, weights and LoRAs, by a few values of each; equal models give equal text."""
    digest = Digest()
    digest.feed(type(model.model.diffusion_model).__name__)
    for key, (weight, *patches) in sorted(model.get_key_patches("diffusion_model.").items()):
        digest.feed(key)
        digest.feed_weight(weight[0])
        for strength, patch, model_strength, *_ in patches:
            digest.feed([strength, model_strength])
            for part in _tensors(patch):
                digest.feed_weight(part)
    return digest.text[:32]


def _tensors(patch):
    """Tensors of a weight patch: nested tuples, or an adapter (LoRA, LoHa ...) that lists them as `weights`."""
    if torch.is_tensor(patch):
        yield patch
    elif isinstance(patch, (list, tuple)):
        for part in patch:
            yield from _tensors(part)
    elif isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
        yield from _tensors(patch.weights)


def feed_model(digest: Digest, model) -> None:
    """Everything on a MODEL but its weights: sampling, options, patches and wrappers of any node."""
    digest.feed(model.get_model_object("model_sampling"))
    others = {name: value for name, value in model.object_patches.items() if name != "model_sampling"}
    digest.feed([others, model.model_options, model.wrappers, model.injections])
    if model.hook_patches:
        digest.unknown.add("hooks")
