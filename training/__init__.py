"""Command-line trainers and the picture-book world that the demo models are trained on."""
