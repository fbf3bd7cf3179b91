"""Reads an ``nn.Module``: its matrices, attentions, norms, routing and statistics.

Knows no optimizer. Works on any module; ``transformers`` and ``peft`` classes
are told by what they look like and never imported for that.
"""
