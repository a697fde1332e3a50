"""Inducing-variable posteriors over matrices: prior, families of q(U), flow, conditional, KL."""
