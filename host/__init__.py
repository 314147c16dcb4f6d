"""The only floor that knows ComfyUI's hooks and model families.

layout.py       which row is which panel, which token is where: what a rule is told about one attention call
run.py          state of one sampling run, made in an outer wrapper and dropped at its end
override.py     one wrapper set and one chained attention override per MODEL; blocks register rules
families.py     model class -> where its self-attention is and how its tokens lie
unet.py, transformer.py     the two kinds of families
consistent.py, bank.py      Consistent Self-Attention as a rule; the characters it remembers
story_sampling.py, panel_store.py, digest.py    a story drawn panel by panel; finished panels on disk, by content
reference_pass.py, story_gen*.py    StoryGen: passes over references, guider, weights, a story panel by panel
reference_attention.py  the same passes answered by the model's own self-attention
prompts.py      one conditioning row per panel
sheet.py, fonts.py, wrapping.py     pictures and captions on one sheet
sounds.py, captioners.py, whisper.py, core_captioner.py    AUDIO, and who puts it into words
taggers.py, tagger_packages.py      which of the words are nouns
sound_words.py, sound_prompt.py     words of captions at their tokens; weighted prompts and keys
sound_sampling.py       weights tuned through the sampler
judge.py, judges.py, clap.py        who compares pictures with a sound and its caption
model_files.py          files and folders of weights in models/
joint.py, imagebind.py              one vector for a sound, a picture or a text
motion.py, frame_rows.py    predicted embeddings of frames and four ways into a video model
trained_board.py, magdiff.py    trained parts of StoryImager and MagDiff as rules
demo.py         the demo models in the host's classes
"""
