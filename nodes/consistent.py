"""Consistent Self-Attention and the characters it remembers (StoryDiffusion, arXiv 2405.01434)."""

import os

import folder_paths
from comfy_api.latest import io

from ..attention.consistent import ConsistentOptions
from ..host import bank, families, override
from ..host.consistent import PATHS, ConsistentRule
from ..host.queueing import refusal
from ..host.rule import check_span, fraction, step_range

Character = io.Custom("STORYWEFT_CHARACTER")
CATEGORY = "Storyweft/Story"
FOLDER = "storyweft_characters"


def check_window(node_id: str, window: int) -> None:
    if window == 1:
        raise ValueError(f"{node_id}: window is 1, so no picture would see another; give 0 or at least 2.")


class ConsistentSelfAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftConsistentSelfAttention",
            display_name="Consistent Self-Attention",
            category=CATEGORY,
            description="Pictures of one batch also look at a random half of each other's tokens, so that the character "
            "they share keeps face, hair and clothes. Needs no training and no weights (StoryDiffusion).",
            search_aliases=["storydiffusion", "consistent character", "csa"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="U-Net of SD1.5, SD2 or SDXL as published; Flux, SD3, Qwen-Image, Wan as an experiment.",
                ),
                io.Float.Input(
                    "sampling_ratio",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of each picture's tokens that the others see. 0 changes nothing; the paper uses 0.5.",
                ),
                io.Int.Input(
                    "draw_seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Seed of which tokens are seen and which layers share. Independent of the sampler's seed.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(PATHS),
                    default="output path",
                    tooltip="Self-attention layers that share. Published: the output path of the U-Net. More layers "
                    "tie the pictures closer together, also in pose and place.",
                ),
                io.Float.Input(
                    "share_early",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Probability that a layer shares at a step before late_from. Published: 0.7.",
                ),
                io.Float.Input(
                    "share_late",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Probability that a layer shares from step late_from on. Published: 0.9.",
                ),
                io.Int.Input(
                    "late_from",
                    default=20,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="First step, counted from 0, that uses share_late. Published: 20.",
                ),
                io.Int.Input(
                    "first_step",
                    default=1,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="First step, counted from 0, that may share at all. Published: 1.",
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Pictures per sliding window of the paper's pseudo code, 0 = every picture sees every other. "
                    "Saves memory, not work. U-Nets only, not together with saved characters.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Part of the noise schedule at which sharing may begin; 0 is the start.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Part of the noise schedule after which nothing is shared; 1 is the end.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", tooltip="The model with sharing; several pictures in one latent batch make a story."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, window=0, start_percent=0.0, end_percent=1.0) -> bool | str:
        rules = (check_window, check_span)
        return refusal(cls, rules, window=window, start_percent=start_percent, end_percent=end_percent)

    @classmethod
    def execute(
        cls,
        model,
        sampling_ratio,
        draw_seed,
        layers,
        share_early=0.7,
        share_late=0.9,
        late_from=20,
        first_step=1,
        window=0,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        node_id = ConsistentRule.node_id
        for name, value in (
            ("sampling_ratio", sampling_ratio),
            ("share_early", share_early),
            ("share_late", share_late),
        ):
            fraction(node_id, name, value)
        check_window(node_id, window)
        sigma_range = step_range(model, node_id, start_percent, end_percent)
        options = ConsistentOptions(sampling_ratio, share_early, share_late, late_from, first_step, window, draw_seed)
        rule, family = ConsistentRule(options, layers, sigma_range), families.find(model, node_id)
        if not any(map(rule.covers, family.layers)):
            raise ValueError(f"{node_id}: layers is '{layers}', and this {family.model_class} has no self-attention there.")
        return io.NodeOutput(override.register(model, rule))


class RecallCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftRecallCharacter",
            display_name="Recall Character",
            category=CATEGORY,
            description="Later pictures read the tokens of a character drawn before, in this or another graph. Use the same "
            "size, steps, scheduler and model as when it was drawn.",
            inputs=[
                io.Model.Input("model", tooltip="Model with or without a Consistent Self-Attention block before it."),
                Character.Input("character", tooltip="From the Story Sampler or from Load Character."),
            ],
            outputs=[io.Model.Output("model", tooltip="The model whose pictures read the character.")],
        )

    @classmethod
    def execute(cls, model, character) -> io.NodeOutput:
        for one in some("StoryweftRecallCharacter", character):
            bank.check_model(one, model, "StoryweftRecallCharacter")
            rule = next((rule for rule in override.rules_of(model) if isinstance(rule, ConsistentRule)), None)
            if rule is None:
                model = override.register(model, ConsistentRule(one.options, one.layers, characters=[one]))
                continue
            if one.name in rule.characters:
                raise ValueError(
                    f"StoryweftRecallCharacter: character '{one.name}' is recalled twice on one model; remove one of them."
                )
            bank.check_layers(one, rule.layers, "StoryweftRecallCharacter")
            model = override.replace(model, rule, rule.changed(characters=[*rule.characters.values(), one]))
        return io.NodeOutput(model)


def some(node_id: str, characters: tuple) -> tuple:
    """`characters` if there are any; ValueError otherwise."""
    if not characters:
        raise ValueError(
            f"{node_id}: character is empty, because the Story Sampler that ran made no bank; set its memory to bank and change "
            "any of its inputs, so that it runs again."
        )
    return characters


def character_folder() -> str:
    """Folder new characters are saved to; it is registered with the host, so that loaders list it."""
    return os.path.join(folder_paths.models_dir, FOLDER)


class SaveCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftSaveCharacter",
            display_name="Save Character",
            category=CATEGORY,
            description="Writes each character to models/storyweft_characters as a .safetensors file with name, description "
            "and the model it belongs to.",
            is_output_node=True,
            inputs=[
                Character.Input("character", tooltip="From the Story Sampler."),
                io.String.Input(
                    "filename_prefix",
                    default="character",
                    tooltip="File name without ending; the character's name is added. Letters, digits, - and _.",
                ),
            ],
            outputs=[io.String.Output("files", tooltip="The files written, one a line.")],
        )

    @classmethod
    def execute(cls, character, filename_prefix) -> io.NodeOutput:
        paths = {}
        for one in some("StoryweftSaveCharacter", character):
            stem = "_".join(part for part in (filename_prefix, one.name) if part)
            safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem)
            if not safe.strip("_"):
                raise ValueError(
                    f"StoryweftSaveCharacter: filename_prefix '{filename_prefix}' holds no letter or digit."
                )
            path = os.path.join(character_folder(), f"{safe}.safetensors")
            if path in paths:
                raise ValueError(
                    f"StoryweftSaveCharacter: characters '{paths[path].name}' and '{one.name}' would both be written to "
                    f"{safe}.safetensors; rename one of them."
                )
            paths[path] = one
        os.makedirs(character_folder(), exist_ok=True)
        for path, one in paths.items():
            bank.save(one, path)
        return io.NodeOutput("\n".join(paths))


class LoadCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadCharacter",
            display_name="Load Character",
            category=CATEGORY,
            description="Reads a character saved before.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file of models/storyweft_characters.",
                )
            ],
            outputs=[Character.Output("character", tooltip="For Recall Character.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path(FOLDER, file)
        return os.path.getmtime(path) if path else file

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput((bank.load(folder_paths.get_full_path_or_raise(FOLDER, file)),))


folder_paths.add_model_folder_path(FOLDER, character_folder())
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")  # else half-written files would be listed

NODES = [ConsistentSelfAttention, RecallCharacter, SaveCharacter, LoadCharacter]
