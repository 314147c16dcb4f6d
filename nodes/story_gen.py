"""StoryGen (Intelligent Grimm): loaders, references with captions, and the guider over three branches."""

import logging
import math

import folder_paths
from comfy_api.latest import io

from ..host import families, override
from ..host import story_gen_references as pictures
from ..host import story_gen_weights as weights
from ..host.reference_attention import ReferenceAttentionRule
from ..host.reference_pass import Noise
from ..host.story_gen import NODE_ID, TRAINED, ReferenceRule, check_family, make_guider, sizing
from ..sampling.story_gen import ALONE, AUTO, STAGES

CATEGORY = "Storyweft/Story"
References = io.Custom("STORYWEFT_REFERENCES")
DEMO = "demo weights (come with Storyweft)"
FOLDER = "diffusion_models"
AS_TRAINED, STANDARD = "as trained", "standard"
ADD_ID, REFERENCES_ID, PLAIN_ID = "StoryweftStoryGenWeights", "StoryweftStoryGenReferences", "StoryweftReferenceAttention"


def finite(node_id: str, **values: float) -> None:
    """ValueError naming the first of the values that is no number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{node_id}: {name} is {value}; give a finite number.")


class StoryGenLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=weights.LOADER_ID,
            display_name="Load StoryGen U-Net",
            category=CATEGORY,
            description="Loads the published U-Net of StoryGen (Intelligent Grimm), all of it: SD1.5's tensors and the image attention "
            "of its own. Text encoder and VAE are those of SD1.5.",
            search_aliases=["intelligent grimm", "storygen", "storysalon", "load unet"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="File in models/diffusion_models: diffusion_pytorch_model.bin of haoningwu/StoryGen, unet folder of "
                    "checkpoint_StorySalon or checkpoint_COCO, under a name of your own.",
                )
            ],
            outputs=[io.Model.Output("model", tooltip="The U-Net with StoryGen's weights inside; core's ModelSave keeps them.")],
        )

    @classmethod
    def execute(cls, unet_name) -> io.NodeOutput:
        return io.NodeOutput(weights.load_unet(folder_paths.get_full_path_or_raise(FOLDER, unet_name)))


class StoryGenWeightsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=ADD_ID,
            display_name="Add StoryGen Weights (experimental)",
            category=CATEGORY,
            description="Adds the image attention of a StoryGen file to another SD1.5 checkpoint. Experimental: it was trained with "
            "StoryGen's own U-Net, nobody has measured it elsewhere. The demo weights are made for the Demo Loader.",
            search_aliases=["intelligent grimm", "storygen", "attn3", "storygen demo"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model; the Demo Loader's for the demo weights."),
                io.Combo.Input(
                    "weights_name",
                    options=[DEMO, *folder_paths.get_filename_list(FOLDER)],
                    tooltip="File in models/diffusion_models that holds attn3 and norm4, alone or in a whole U-Net, or the demo weights.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with StoryGen's weights beside it; saving it leaves them out.")],
        )

    @classmethod
    def execute(cls, model, weights_name) -> io.NodeOutput:
        if weights_name == DEMO:
            return io.NodeOutput(weights.add_demo(model, ADD_ID))
        state, metadata = weights.read(folder_paths.get_full_path_or_raise(FOLDER, weights_name), ADD_ID)
        if base := metadata.get("base"):  # the pack's trainer names the checkpoint that it trained for
            logging.info("%s: %s was trained for the checkpoint of SHA-256 %s and for no other.", ADD_ID, weights_name, base)
        else:
            logging.warning("%s: %s was not trained with this model; what it draws is an experiment.", ADD_ID, weights_name)
        return io.NodeOutput(weights.add(model, state, metadata, weights_name, ADD_ID))


class StoryGenReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=REFERENCES_ID,
            display_name="StoryGen References",
            category=CATEGORY,
            description="Pictures of the story so far, or portraits of its characters, each with a caption. Oldest first.",
            search_aliases=["storygen reference", "previous frames", "character portrait"],
            inputs=[
                io.Image.Input("images", tooltip="One or more pictures, oldest first. Each is stretched to width x height."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What each picture shows, one line for each in their order. A line may be empty, not missing.",
                ),
                io.Clip.Input("clip", tooltip="Text encoder of the model."),
                io.Vae.Input("vae", tooltip="VAE of the model; used when the guider needs it."),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Width in pixels that references get. StoryGen was trained with 512, the demo weights with 128.",
                ),
                io.Int.Input("height", default=512, min=64, max=2048, step=8, tooltip="Height in pixels, likewise."),
                io.Combo.Input(
                    "ground",
                    options=list(pictures.GROUNDS),
                    default="white",
                    advanced=True,
                    optional=True,
                    tooltip="What shows through transparent parts of RGBA pictures.",
                ),
                References.Input("previous", optional=True, tooltip="References that are older than these."),
            ],
            outputs=[References.Output("references", tooltip="For StoryGen Guider, StoryGen Story or Reference Attention.")],
        )

    @classmethod
    def execute(cls, images, captions, clip, vae, width, height, ground="white", previous=()) -> io.NodeOutput:
        texts = pictures.caption_lines(captions, len(images), REFERENCES_ID)
        made = [
            pictures.Picture(
                pictures.fitted(image, (height, width), ground, REFERENCES_ID),
                text,
                pictures.encode_caption(clip, text, REFERENCES_ID),
                vae,
            )
            for image, text in zip(images, texts, strict=True)
        ]
        return io.NodeOutput((*previous, *made))


def stage_input(tooltip: str):
    return io.Combo.Input("stage", options=list(STAGES), default=AUTO, tooltip=tooltip)


STAGE_TIP = (
    "auto-regressive: the further back, the noisier, so that order counts. multi-image-condition: all alike, for portraits. "
    "no: leave references out."
)
NOISE = io.Int.Input(
    "reference_seed",
    default=0,
    min=0,
    max=2**64 - 1,
    advanced=True,
    optional=True,
    tooltip="Seed of the noise that references get: one draw for all of them and all steps.",
)
STRENGTH = io.Float.Input(
    "strength",
    default=1.0,
    min=0.0,
    max=2.0,
    step=0.01,
    tooltip="Weight of the image branch as a whole. 1 as published, 0 is exactly the model without references.",
)
RANGE = io.Combo.Input(
    "reference_range",
    options=[AS_TRAINED, STANDARD],
    default=AS_TRAINED,
    advanced=True,
    optional=True,
    tooltip="Pixel range of references at the VAE. as trained: what the weights saw, 0 to 1 for the published ones. standard: -1 "
    "to 1, as the paper has it.",
)


class StoryGenGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=NODE_ID,
            display_name="StoryGen Guider",
            category=CATEGORY,
            description="Guides sampling by a prompt and by previous pictures with their captions (StoryGen, Intelligent Grimm): "
            "separate scales for picture and text. For SamplerCustomAdvanced; authors: ddim, ddim_uniform, 40 steps.",
            search_aliases=["intelligent grimm", "storygen", "visual storytelling", "dual cfg"],
            inputs=[
                io.Model.Input("model", tooltip="From Load StoryGen U-Net or Add StoryGen Weights."),
                io.Conditioning.Input("positive", tooltip="What the new picture shows."),
                io.Conditioning.Input(
                    "negative", tooltip="Empty prompt, or what not to show; also the caption of the grey picture of no reference."
                ),
                stage_input(STAGE_TIP),
                io.Float.Input(
                    "text_scale",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance by the prompt. Authors: 7. Up to 1 turns all guidance off.",
                ),
                io.Float.Input(
                    "image_scale",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance by the references. Authors: 3.5. 1 leaves the grey branch out and is a third faster.",
                ),
                STRENGTH,
                References.Input("references", optional=True, tooltip="From StoryGen References; none is stage no."),
                NOISE,
                RANGE,
            ],
            outputs=[
                io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced."),
                io.String.Output("report", tooltip="Stage, passes of each step and the memory that references take."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        stage,
        text_scale,
        image_scale,
        strength,
        references=(),
        reference_seed=0,
        reference_range=AS_TRAINED,
    ) -> io.NodeOutput:
        finite(NODE_ID, text_scale=text_scale, image_scale=image_scale, strength=strength)
        own = weights.weights_of(model, NODE_ID)
        check_family(families.find(model, NODE_ID), NODE_ID)
        line, rule = used(NODE_ID, stage, references, strength), None
        if not line:
            span = own.pixel_range if reference_range == AS_TRAINED else pictures.STANDARD
            encoded = pictures.encode(references, span)
            blank = pictures.grey(references[0], negative[0])
            rule = ReferenceRule(own.sites, encoded, blank, stage, Noise(reference_seed), strength)
            model = override.register(model, rule)
            line = f"references: {len(encoded)}, {stage}; {sizing(model, rule)}"
        guider = make_guider(model, rule, positive, negative, text_scale, image_scale)
        return io.NodeOutput(guider, line)


def used(node_id: str, stage: str, references, strength: float) -> str:
    """Why references play no part, or nothing; warns of what is beyond training."""
    if stage != ALONE and not references:
        line = f"no references are connected, so stage {stage} runs as stage {ALONE}"
        logging.warning("%s: %s.", node_id, line)
        return line
    if stage == ALONE or strength == 0:
        return f"stage is {ALONE}: no references" if stage == ALONE else "strength is 0: no references"
    if len(references) > TRAINED:
        logging.warning("%s: %d references; the weights were trained with up to %d.", node_id, len(references), TRAINED)
    return ""


class ReferenceAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PLAIN_ID,
            display_name="Reference Attention",
            category=CATEGORY,
            description="Lets the positive prompt's rows look at reference pictures by the model's own self-attention, without any "
            "training: StoryGen's passes over noised references, not its weights. Works on U-Nets of SD1.5, SD2 and SDXL.",
            search_aliases=["reference only", "training-free reference", "image reference"],
            inputs=[
                io.Model.Input("model", tooltip="A U-Net of single pictures: SD1.5, SD2, SDXL or a relative."),
                References.Input("references", tooltip="From StoryGen References, in the size of the model: 512, SDXL 1024."),
                stage_input(STAGE_TIP),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Weight of the reference branch beside the text's. 0 is exactly the model without references; 1 is more like "
                    "them and obeys the prompt less.",
                ),
                NOISE,
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model that sees the references; for any sampler."),
                io.String.Output("report", tooltip="Stage, passes of each step and the memory that references take."),
            ],
        )

    @classmethod
    def execute(cls, model, references, stage, strength, reference_seed=0) -> io.NodeOutput:
        finite(PLAIN_ID, strength=strength)
        check_family(families.find(model, PLAIN_ID), PLAIN_ID)
        line = used(PLAIN_ID, stage, references, strength)
        if line:
            return io.NodeOutput(model, line)
        rule = ReferenceAttentionRule(
            weights.transformer_blocks(model.model.diffusion_model),
            pictures.encode(references, pictures.STANDARD),
            stage,
            Noise(reference_seed),
            strength,
        )
        model = override.register(model, rule)
        return io.NodeOutput(model, f"references: {len(references)}, {stage}; {sizing(model, rule)}")


NODES = [StoryGenLoader, StoryGenWeightsNode, StoryGenReferences, StoryGenGuider, ReferenceAttention]
