"""What decides a picture is told apart by content: weights, LoRAs, patches of other nodes, ControlNets, samplings."""

import functools

import comfy.controlnet
import comfy.model_sampling
import comfy.weight_adapter
import pytest
import tiny
import torch
from comfy_extras.nodes_freelunch import FreeU
from storyweft.host.digest import Digest, feed_model, fingerprint

KEY = "diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_k.weight"


def text(*values) -> str:
    digest = Digest()
    digest.feed(values)
    assert not digest.unknown
    return digest.text


def of_model(model) -> Digest:
    digest = Digest()
    feed_model(digest, model)
    return digest


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def with_lora(model, seed: int, strength=1.0, adapter=True):
    shape = model.model.state_dict()[KEY].shape
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    patch = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 1.0, None, None, None)) if adapter else (up @ down,)
    patched = model.clone()
    patched.add_patches({KEY: patch}, strength)
    return patched


def test_equal_weights_have_one_fingerprint_and_others_another(sd15):
    assert fingerprint(sd15) == fingerprint(tiny.build("sd15")) == fingerprint(sd15.clone())
    assert fingerprint(sd15) != fingerprint(tiny.build("sd15", seed=1))
    assert fingerprint(sd15) != fingerprint(tiny.build("sd2"))


@pytest.mark.parametrize("adapter", [True, False])
def test_two_loras_of_one_shape_and_strength_are_two_models(sd15, adapter):
    marks = [fingerprint(with_lora(sd15, seed, strength, adapter)) for seed, strength in ((1, 1.0), (2, 1.0), (1, 0.5))]
    assert len({fingerprint(sd15), *marks}) == 4
    assert fingerprint(with_lora(sd15, 1, 1.0, adapter)) == marks[0]


def scaled(factor, extra=0):
    def patch(h, options, bias=extra):
        return h * factor + bias

    return patch


def test_functions_are_what_they_hold_and_do():
    assert text(scaled(2)) == text(scaled(2))
    different = [
        *(scaled(2), scaled(3), scaled(2, 1), functools.partial(scaled, 2)),
        *(lambda h, options: h, lambda h, options: h + 1, lambda: lambda h: h + 1, lambda: lambda h: h + 2),
    ]
    assert len({text(one) for one in different}) == len(different)
    assert text(torch.nn.Linear(2, 2).forward) != text(torch.nn.Linear(2, 2).forward), "a method is its object too"


def test_values_of_other_types_or_shapes_are_told_apart():
    values = [1, 1.0, True, "1", None, (1,), (1, 1), {"a": 1}, {"b": 1}, torch.ones(2), torch.ones(2, 1), torch.ones(2).half()]
    assert len({text(value) for value in values}) == len(values)
    assert text({"b": 1, "a": 2}) == text({"a": 2, "b": 1})
    assert text(("ab", "c")) != text(("a", "bc"))


def test_what_cannot_be_told_is_named():
    digest = Digest()
    digest.feed({"patch": scaled(object())})
    assert digest.unknown == {"object"}


def test_a_circle_ends():
    def again(depth):
        return again(depth - 1)

    values = []
    values.append(values)
    assert text(again, values)


def test_patches_of_other_nodes_are_part_of_a_model(sd15):
    models = [sd15, *(FreeU.execute(sd15, 1.1, 1.2, skip, 0.4).args[0] for skip in (0.6, 0.7))]
    digests = [of_model(model) for model in models]
    assert not any(digest.unknown for digest in digests)
    assert len({digest.text for digest in digests}) == 3
    assert of_model(FreeU.execute(sd15, 1.1, 1.2, 0.6, 0.4).args[0]).text == digests[1].text


def test_an_object_that_nobody_can_read_makes_a_model_unknown(sd15):
    model = sd15.clone()
    model.model_options["transformer_options"]["somebody"] = object()
    assert of_model(model).unknown == {"object"}


def test_another_model_sampling_is_another_model(sd15):
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    marks = {of_model(sd15).text}
    for zsnr in (False, True):
        model = sd15.clone()
        model.add_object_patch("model_sampling", Sampling(sd15.model.model_config, zsnr=zsnr))
        marks.add(of_model(model).text)
    assert len(marks) == 3


def control(strength=1.0, seed=1, hint=1.0):
    network = torch.nn.Linear(3, 3)
    tiny.fill(network, seed)
    made = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    return made.set_cond_hint(torch.full((1, 3, 8, 8), hint), strength)


def test_control_nets_are_their_picture_strength_and_weights():
    marks = [text(control()), text(control(strength=0.5)), text(control(seed=2)), text(control(hint=0.5))]
    chained = control()
    chained.set_previous_controlnet(control(seed=2))
    assert len({*marks, text(chained)}) == 5
    assert text(control()) == marks[0]


def test_a_control_net_of_another_pack_is_unknown():
    class Foreign(comfy.controlnet.ControlNet):
        pass

    digest = Digest()
    digest.feed(Foreign(torch.nn.Linear(3, 3), load_device=torch.device("cpu"), manual_cast_dtype=None))
    assert digest.unknown == {"test_a_control_net_of_another_pack_is_unknown.<locals>.Foreign"}
