"""Networks with weights; layer classes arrive as `operations`, so that the host's offload and casting reach them.

motion_predictor.py     Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434)
story_board.py, trained_board.py    StoryImager's context extractor, LoRA branches and gates (arXiv 2404.05979)
magdiff.py      MagDiff's cut-outs, latent pyramid and alphas (arXiv 2311.17338)
autoencoder.py  the demo models' picture autoencoder
"""
