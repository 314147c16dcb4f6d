"""One vector for a sound, a picture or a text: encoded, added, and handed to models as an image embedding or as a prompt."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..host import joint, sounds
from ..host.joint import Embedding
from ..host.queueing import ABSENT, refusal
from ..models.joint_embedding import add, renormed, slerp
from ..models.sound_mapping import PromptMapping

CATEGORY = "Storyweft/Sound"
EncoderType = io.Custom("STORYWEFT_JOINT_ENCODER")
EmbeddingType = io.Custom("STORYWEFT_EMBEDDING")
MappingType = io.Custom("STORYWEFT_PROMPT_MAPPING")
Embeds = io.Custom("EMBEDS")  # what cubiq's IPAdapterEmbeds takes
REPLACE, APPEND = "replace text", "append to text"

joint.add_folders()


def embedding_of(embedding, node_id: str, name: str = "embedding") -> Embedding:
    if not isinstance(embedding, Embedding):
        raise ValueError(f"{node_id}: {name} is {type(embedding).__name__}; connect an embedding of StoryweftJointEncode.")
    return embedding


class LoadJointEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadJointEncoder",
            display_name="Load Joint Encoder",
            category=CATEGORY,
            description="Loads ImageBind, or the demo encoders: sounds, pictures and texts become vectors of one space.",
            search_aliases=["imagebind", "audio embedding", "multimodal embedding"],
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=joint.names(joint.FOLDER),
                    default=joint.DEMO,
                    tooltip="demo: the picture-book encoders. Files of models/imagebind: imagebind_huge.pth.",
                ),
                io.Combo.Input(
                    "towers",
                    options=list(joint.WANTED),
                    default="all",
                    advanced=True,
                    tooltip="ImageBind: which towers to load. The audio tower alone takes 0.35 GB in place of 4.3.",
                ),
                io.Boolean.Input(
                    "licence_read",
                    default=False,
                    tooltip="ImageBind's weights are CC BY-NC-SA 4.0: not for commercial use. Switch on to say you know.",
                ),
            ],
            outputs=[EncoderType.Output("encoder", tooltip="For Joint Encode.")],
        )

    @classmethod
    def validate_inputs(cls, encoder=None, licence_read=False) -> bool | str:
        return refusal(cls, (joint.check_licence,), encoder=encoder, licence_read=licence_read)

    @classmethod
    def execute(cls, encoder, towers="all", licence_read=False) -> io.NodeOutput:
        return io.NodeOutput(joint.load_encoder(encoder, towers, licence_read, "StoryweftLoadJointEncoder"))


def lines_of(node_id: str, audio, image, text: str) -> list[str]:
    """Lines of the text; ValueError when it is empty and nothing else is connected."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if audio is None and image is None and not lines:
        raise ValueError(f"{node_id}: audio, image and text are all empty; connect one of them.")
    return lines


class JointEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftJointEncode",
            display_name="Joint Encode",
            category=CATEGORY,
            description="Makes the vector of a sound, of pictures, or of texts. Connect one of them.",
            search_aliases=["imagebind encode", "audio embedding", "text embedding"],
            inputs=[
                EncoderType.Input("encoder", tooltip="From Load Joint Encoder."),
                io.Audio.Input("audio", optional=True, tooltip="One sound or a batch."),
                io.Image.Input("image", optional=True, tooltip="One picture or a batch."),
                io.String.Input(
                    "text", default="", multiline=True, optional=True, dynamic_prompts=False,
                    tooltip="One text a line, used when neither sound nor picture is connected.",
                ),
                io.Int.Input(
                    "clips", default=3, min=1, max=20, advanced=True,
                    tooltip="ImageBind: how many 2 s clips of a sound are heard, spread from its beginning to its end. Authors: 3.",
                ),
                io.Combo.Input(
                    "short", options=["loop", "pad"], default="loop", advanced=True,
                    tooltip="ImageBind: sounds below 2 s are repeated, or padded as the authors do, which is far from silence.",
                ),
            ],
            outputs=[
                EmbeddingType.Output("embedding", tooltip="A vector for each sound, picture or line."),
                io.String.Output("report", tooltip="Sizes and norms."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, audio=ABSENT, image=ABSENT, text="") -> bool | str:
        return refusal(cls, (lines_of,), audio=audio, image=image, text=text)

    @classmethod
    def execute(cls, encoder, audio=None, image=None, text="", clips=3, short="loop") -> io.NodeOutput:
        node_id = "StoryweftJointEncode"
        if audio is not None and image is not None:
            raise ValueError(f"{node_id}: audio and image are both connected; encode each by itself and mix them.")
        lines, quiet = lines_of(node_id, audio, image, text), []
        if audio is not None:
            waves, rate = sounds.checked(audio, node_id)
            quiet = [index for index, wave in enumerate(waves, 1) if float(wave.abs().max()) < sounds.SILENT]
            found = Embedding(encoder.audio(waves, rate, clips, short), "audio", encoder.space)
        elif image is not None:
            found = Embedding(encoder.image(image), "image", encoder.space)
        else:
            found = Embedding(encoder.text(lines), "text", encoder.space)
        if not found.vectors.isfinite().all():
            raise ValueError(f"{node_id}: the embedding of {found.modality} holds no numbers (NaN).")
        silence = f"; nearly silent, so that their embedding says little: sounds {quiet}" if quiet else ""
        return io.NodeOutput(found, joint.describe(found) + silence)


def check_circle(node_id: str, way: str, second_weight: float) -> None:
    if way == "great circle" and not 0 <= second_weight <= 1:
        raise ValueError(f"{node_id}: a great circle needs a second_weight from 0 to 1, not {second_weight}.")


class EmbeddingMix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftEmbeddingMix",
            display_name="Mix Embeddings",
            category=CATEGORY,
            description="Adds embeddings of one space with weights, or blends two along the great circle; the result has a chosen norm.",
            search_aliases=["imagebind arithmetic", "embedding arithmetic", "add audio and image", "slerp"],
            inputs=[
                EmbeddingType.Input("first", tooltip="An embedding of Joint Encode."),
                io.Float.Input(
                    "first_weight", default=0.5, min=-10.0, max=10.0, step=0.01,
                    tooltip="Its weight. Negative takes it away.",
                ),
                EmbeddingType.Input("second", optional=True, tooltip="Another embedding of the same space."),
                io.Float.Input(
                    "second_weight", default=0.5, min=-10.0, max=10.0, step=0.01,
                    tooltip="Its weight; with great circle the share of the second, from 0 to 1.",
                ),
                EmbeddingType.Input("third", optional=True, tooltip="One more embedding of the same space."),
                io.Float.Input("third_weight", default=0.5, min=-10.0, max=10.0, step=0.01, tooltip="Its weight."),
                io.Combo.Input(
                    "way", options=["sum", "great circle"], default="sum",
                    tooltip="sum of unit vectors with weights, or a blend of the first two along the great circle.",
                ),
                io.Float.Input(
                    "norm", default=20.0, min=0.01, max=1000.0, step=0.01,
                    tooltip="Length of the result, where no reference is connected. 20 is what unCLIP forks use for sounds.",
                ),
                io.ClipVisionOutput.Input(
                    "reference", optional=True,
                    tooltip="Pictures encoded by the model's own CLIP vision: the result gets the mean length of their embeddings.",
                ),
            ],
            outputs=[
                EmbeddingType.Output("embedding", tooltip="The mixture."),
                io.String.Output("report", tooltip="Sizes and norms."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, second_weight=None, way=None) -> bool | str:
        return refusal(cls, (check_circle,), second_weight=second_weight, way=way)

    @classmethod
    def execute(
        cls, first, first_weight, second_weight, third_weight, way, norm, second=None, third=None, reference=None
    ) -> io.NodeOutput:
        node_id = "StoryweftEmbeddingMix"
        check_circle(node_id, way, second_weight)
        given = {"first": (first, first_weight), "second": (second, second_weight), "third": (third, third_weight)}
        parts = [
            (embedding_of(one, node_id, name), weight) for name, (one, weight) in given.items() if one is not None
        ]
        spaces = {(one.space, one.vectors.shape[1]) for one, _ in parts}
        if len(spaces) > 1:
            listed = ", ".join(f"{space} {width}" for space, width in sorted(spaces))
            raise ValueError(f"{node_id}: embeddings of different spaces ({listed}) have no sum; use one encoder.")
        rows = max(len(one.vectors) for one, _ in parts)
        if any(len(one.vectors) not in (1, rows) for one, _ in parts):
            raise ValueError(f"{node_id}: embeddings have {[len(one.vectors) for one, _ in parts]} rows; give one or as many.")
        vectors = [one.vectors.expand(rows, -1) for one, _ in parts]
        if reference is not None:
            norm = float(reference.image_embeds.norm(dim=-1).mean())
        if way == "great circle":
            if len(parts) != 2:
                raise ValueError(f"{node_id}: a great circle needs first and second; there are {len(parts)}.")
            mixed = slerp(*vectors, second_weight)
        else:
            mixed = add(vectors, [weight for _, weight in parts])
        try:
            mixed = renormed(mixed, norm)
        except ValueError as error:
            raise ValueError(f"{node_id}: {error}") from error
        modalities = {one.modality for one, _ in parts}
        found = Embedding(mixed, modalities.pop() if len(modalities) == 1 else "", parts[0][0].space)
        return io.NodeOutput(found, joint.describe(found))


class EmbeddingToVision(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftEmbeddingToVision",
            display_name="Embedding as CLIP Vision Output",
            category=CATEGORY,
            description="Hands an embedding to models that take image embeddings of ViT-H: to unCLIPConditioning and an unCLIP model, or "
            "to an IP-Adapter made for ViT-H.",
            search_aliases=["unclip", "ip-adapter embeds", "audio to image"],
            inputs=[
                EmbeddingType.Input("embedding", tooltip="An ImageBind embedding at the norm the model expects; mix it first."),
                io.Model.Input(
                    "model", optional=True, tooltip="The unCLIP model, to make sure that it takes the embedding."
                ),
            ],
            outputs=[
                io.ClipVisionOutput.Output("clip_vision_output", tooltip="For unCLIPConditioning, strength 1."),
                Embeds.Output("embeds", tooltip="For IPAdapterEmbeds with a ViT-H adapter that is not 'plus'."),
            ],
        )

    @classmethod
    def execute(cls, embedding, model=None) -> io.NodeOutput:
        node_id = "StoryweftEmbeddingToVision"
        vectors = embedding_of(embedding, node_id).vectors
        if embedding.space == "ImageBind" and vectors.shape[1] != 1024:
            raise ValueError(f"{node_id}: embedding has {vectors.shape[1]} numbers; ViT-H's have 1024.")
        if model is not None:
            joint.check_unclip(model, vectors.shape[1], node_id)
        return io.NodeOutput(joint.as_vision_output(vectors), vectors[:, None])


class LoadPromptMapping(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftLoadPromptMapping",
            display_name="Load Prompt Mapping",
            category=CATEGORY,
            description="Loads a network that turns one embedding into a prompt; training.sound_mapping makes them.",
            search_aliases=["mapping network", "embedding to prompt", "audio token"],
            inputs=[
                io.Combo.Input(
                    "mapping",
                    options=joint.names(joint.MAPPINGS),
                    default=joint.DEMO,
                    tooltip="demo: for the picture-book models. Files of models/prompt_mappings.",
                )
            ],
            outputs=[
                MappingType.Output("mapping", tooltip="For Apply Prompt Mapping."),
                io.String.Output("report", tooltip="Architecture and sizes."),
            ],
        )

    @classmethod
    def execute(cls, mapping) -> io.NodeOutput:
        found = joint.load_mapping(mapping, "StoryweftLoadPromptMapping")
        return io.NodeOutput(found, joint.settings(found))


def check_way(node_id: str, way: str, text) -> None:
    if way == APPEND and text is None:
        raise ValueError(f"{node_id}: way is '{APPEND}' and text is not connected.")


class ApplyPromptMapping(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftApplyPromptMapping",
            display_name="Apply Prompt Mapping",
            category=CATEGORY,
            description="The prompt that a mapping network finds for an embedding, in place of a text's rows or after them.",
            search_aliases=["mapping network", "embedding to conditioning", "audio to conditioning"],
            inputs=[
                MappingType.Input("mapping", tooltip="From Load Prompt Mapping."),
                EmbeddingType.Input("embedding", tooltip="From Joint Encode or Mix Embeddings."),
                io.Conditioning.Input(
                    "text", optional=True,
                    tooltip="A prompt of the model's own text encoder: mapped rows replace or follow its rows; its pooled output stays "
                    "unless the mapping predicts one.",
                ),
                io.Combo.Input(
                    "way", options=[REPLACE, APPEND], default=REPLACE,
                    tooltip="replace text: the mapped prompt alone. append to text: the first mapped rows after the text's, which keeps "
                    "the prompt.",
                ),
                io.Int.Input(
                    "rows", default=0, min=0, max=1024,
                    tooltip="How many of the mapped rows are taken, from the first. 0: all for replace, 8 for append.",
                ),
                io.Float.Input(
                    "gain", default=1.0, min=0.0, max=4.0, step=0.01, advanced=True,
                    tooltip="Multiplies what is predicted about the mean prompt. Mappings trained on a squared loss predict too little "
                    "spread; up to 2 gives it back. 0: the mean prompt.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="replace text: share of the mapped prompt; the rest is the text's.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="A row for each embedding."),
                io.String.Output("report", tooltip="What was done."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, way=None, text=ABSENT) -> bool | str:
        return refusal(cls, (check_way,), way=way, text=text)

    @classmethod
    def execute(cls, mapping, embedding, way, rows=0, gain=1.0, strength=1.0, text=None) -> io.NodeOutput:
        node_id = "StoryweftApplyPromptMapping"
        check_way(node_id, way, text)
        if not isinstance(mapping, PromptMapping):
            raise ValueError(f"{node_id}: mapping is {type(mapping).__name__}; connect StoryweftLoadPromptMapping.")
        found = embedding_of(embedding, node_id)
        config = mapping.config
        if found.vectors.shape[1] != config["inside"] or found.space != config.get("space", found.space):
            raise ValueError(
                f"{node_id}: embedding is {found.space} {found.vectors.shape[1]} and the mapping was trained on "
                f"{config.get('space', 'another space')} {config['inside']}."
            )
        if rows > config["length"]:
            raise ValueError(f"{node_id}: rows is {rows} and the mapping makes {config['length']}.")
        with torch.no_grad():
            mapped, pooled = mapping(found.vectors, found.modality, gain)
        mapped = mapped[:, : rows or (8 if way == APPEND else config["length"])]
        if text is None:
            made = [[mapped, {} if pooled is None else {"pooled_output": pooled}]]
        else:
            made = [[joined(z, mapped, way, strength, node_id), kept(extras, pooled)] for z, extras in text]
        report = f"{joint.settings(mapping)}; {way}, {mapped.shape[1]} rows for {joint.describe(found)}"
        return io.NodeOutput(made, report)


def joined(z: Tensor, mapped: Tensor, way: str, strength: float, node_id: str) -> Tensor:
    """Mapped rows [n, m, width] in place of those of a text [1 or n, tokens, width], or after them."""
    if z.shape[-1] != mapped.shape[-1]:
        raise ValueError(
            f"{node_id}: the mapping makes rows of {mapped.shape[-1]} and the text has {z.shape[-1]}: it is of another text encoder."
        )
    n = max(len(z), len(mapped))
    z, mapped = (x.expand(n, -1, -1) if len(x) == 1 else x for x in (z, mapped.to(z)))
    if len(z) != len(mapped):
        raise ValueError(f"{node_id}: text has {len(z)} rows and embedding {len(mapped)}; give one or as many.")
    if way == APPEND:
        return torch.cat([z, mapped], 1)
    if strength == 1:
        return mapped
    length = min(z.shape[1], mapped.shape[1])
    return torch.lerp(z[:, :length], mapped[:, :length], strength)


def kept(extras: dict, pooled: Tensor | None) -> dict:
    """A text's dictionary; a predicted pooled vector takes the place of its own, its attention mask no longer fits."""
    out = {key: value for key, value in extras.items() if key != "attention_mask"}
    return out if pooled is None else {**out, "pooled_output": pooled}


NODES = [LoadJointEncoder, JointEncode, EmbeddingMix, EmbeddingToVision, LoadPromptMapping, ApplyPromptMapping]
