"""Multi-objective search over configuration keys: space, study, pruning, selection, tables and figures."""
