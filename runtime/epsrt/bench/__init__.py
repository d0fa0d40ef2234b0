"""epsrt bench: how fast engines sample a bundle, side by side, and whether that has changed."""
