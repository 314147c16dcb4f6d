"""Networks with weights; layer classes arrive as `operations`, so that the host's offload and casting reach them.

motion_predictor.py     Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434)
story_board.py, trained_board.py    StoryImager's context extractor, LoRA branches and gates (arXiv 2404.05979)
magdiff.py      MagDiff's cut-outs, latent pyramid and alphas (arXiv 2311.17338)
autoencoder.py  the demo models' picture autoencoder
story_gen.py    StoryGen's image attention and its published layout
act.py, act_frontend.py     the ACT audio captioner and what it hears; sound_encoder.py  its encoder alone, in a CLIP's space
audioclip.py, fbsp.py, clip_resnet.py   AudioCLIP: sound tower and its time-frequency bank, CLIP's RN50
imagebind.py, imagebind_frontend.py, bind_network.py    ImageBind's towers, its log-mel, ImageBind-LLM's bind network
joint_embedding.py, sound_mapping.py    arithmetic on embeddings; networks from one embedding to a prompt
fused_attention.py  attention with fused projections under torch's names
"""
