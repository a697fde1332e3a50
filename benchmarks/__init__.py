"""Benchmarks of speed, memory and sampling cost; each module is a command."""
