"""Data sets, prompts, encoding and choice scoring."""
