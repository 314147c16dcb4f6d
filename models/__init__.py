"""Networks with weights; layer classes arrive as `operations`, so that the host's offload and casting reach them.

autoencoder.py  the demo models' picture autoencoder
story_gen.py    StoryGen's image attention and its published layout
"""
