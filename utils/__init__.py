"""Data, model loading, run logging, checkpoints and plots; independent of the method in `bnn`."""
