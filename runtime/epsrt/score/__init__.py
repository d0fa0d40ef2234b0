"""How good samples are: distances between sets of images in an extractor's features."""
