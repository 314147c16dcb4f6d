"""Storyweft blocks beside the core nodes that people put on one MODEL: right in either order, or refused by name."""

import comfy.model_patcher
import pytest
import tiny
import torch
from comfy_extras import (
    nodes_context_windows,
    nodes_easycache,
    nodes_freelunch,
    nodes_hypertile,
    nodes_nag,
    nodes_pag,
    nodes_sag,
    nodes_tomesd,
)
from storyweft.attention.consistent import ConsistentOptions
from storyweft.host import override
from storyweft.host.consistent import ConsistentRule

ROWS = 3
RULES = {
    "consistent": lambda: ConsistentRule(
        ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0), "output path"
    ),
}
FINE = {
    "freeu": lambda model: nodes_freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2),
    "freeu v2": lambda model: nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2),
    "pag": lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0),
    "sag": lambda model: nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0),
    "nag": lambda model: nodes_nag.NAGuidance.execute(model, 5.0, 0.5, 1.5),
    "easycache": lambda model: nodes_easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False),
    "context windows": lambda model: nodes_context_windows.ContextWindowsManualNode.execute(
        model, 2, 1, "standard_static", 1, False, "pyramid", 0, False, causal_window_fix=False
    ),
}
REFUSED = {
    "hypertile": lambda model: nodes_hypertile.HyperTile.execute(model, 32, 2, 0, False),
    "tome": lambda model: nodes_tomesd.TomePatchModel.execute(model, 0.5),
}


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def inputs(size=(16, 16)):
    return tiny.conditioning("sd15", ROWS, 1), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", ROWS, size)


def patched(execute, model):
    """MODEL of a core node, whichever form its answer takes."""
    answer = execute(model)
    return answer[0] if isinstance(answer, tuple) else answer.args[0]


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("node", FINE)
def test_a_block_and_a_core_node_work_together_in_either_order(sd15, node, rule, monkeypatch):
    alone = tiny.sample(patched(FINE[node], sd15), *inputs())
    after = tiny.sample(patched(FINE[node], override.register(sd15, RULES[rule]())), *inputs())
    before = tiny.sample(override.register(patched(FINE[node], sd15), RULES[rule]()), *inputs())
    assert apart(before, after) < 2e-5
    assert apart(after, alone) > 1e-4
    assert apart(after, tiny.sample(override.register(sd15, RULES[rule]()), *inputs())) > 1e-5
    if node not in ("nag", "easycache"):  # NAG works on batched parts only, EasyCache measures what it skips
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1)
        assert apart(tiny.sample(override.register(patched(FINE[node], sd15), RULES[rule]()), *inputs()), after) < 2e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("node", REFUSED)
def test_nodes_that_regroup_tokens_are_refused_by_name(sd15, node, rule):
    for model in (
        patched(REFUSED[node], override.register(sd15, RULES[rule]())),
        override.register(patched(REFUSED[node], sd15), RULES[rule]()),
    ):
        with pytest.raises(RuntimeError, match=r"HyperTile|ToMe"):
            tiny.sample(model, *inputs())


def test_a_layer_that_self_attention_guidance_answers_is_refused_by_name(sd15):
    rule = ConsistentRule(ConsistentOptions(share_early=1.0, share_late=1.0, first_step=0), "all")
    model = nodes_sag.SelfAttentionGuidance.execute(override.register(sd15, rule), 0.5, 2.0).args[0]
    with pytest.raises(RuntimeError, match=r"middle block 0.*nodes_sag"):
        tiny.sample(model, *inputs())


def test_one_evaluation_of_a_block_leaves_the_models_options_as_they_were(sd15):
    model = override.register(sd15, RULES["consistent"]())
    before = {key: value for key, value in model.model_options["transformer_options"].items() if key != "patches"}
    tiny.sample(model, *inputs())
    after = {key: value for key, value in model.model_options["transformer_options"].items() if key != "patches"}
    assert before == after
    assert torch.equal(tiny.sample(sd15, *inputs()), tiny.sample(sd15.clone(), *inputs()))
