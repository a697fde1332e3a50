"""Data, model loading, run logging, checkpoints and plots; independent of the method in `bnn`."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in ``bnn``, of which nothing here knows
