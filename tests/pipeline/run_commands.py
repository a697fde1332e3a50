"""A command line of every method that trains."""

METHODS = {
    "sgp": ("method=sgp", "train.n_mc=2", "train.draws_per_batch=2"),
    "mle": ("method=mle",),
    "mc_dropout": ("method=mc_dropout", "train.graph_padding=1"),  # masks depend on the width of the batch
    "ensemble": ("method=ensemble",),
    "sgp_ensemble": ("method=sgp_ensemble", "method.factory.members=2"),
    "blob_ensemble": ("method=blob_ensemble", "method.factory.members=2", "method.factory.gamma=null"),
    "blob": ("method=blob", "method.factory.gamma=null"),
    "scalabl": ("method=scalabl", "method.factory.gamma=null"),
    "adalora": ("method=adalora",),
    "compiled": ("method=sgp", "train.compile=true"),
    "warm-up": ("method=sgp", "train.beta_warmup=0.5"),
}
