"""One run: ``run`` prepares it, ``training`` maximises the ELBO, ``evaluation`` predicts and writes results.

``training`` imports ``evaluation`` and ``graphs``, ``evaluation`` imports ``run``, ``run`` imports ``claim`` (no run is
made in the folder of another); ``processes`` makes workers for many runs at once. All join ``bnn`` (the method) with
``utils`` (data, models, run folders, processes). The entry points ``train_script.py`` and ``search_script.py`` stand on
these.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in ``bnn``, which PEFT is imported before here
