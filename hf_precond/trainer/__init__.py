"""The transformers side: the names under ``--optim``, Trainers, callback and model card.

Importing this package imports neither torch nor transformers; the modules do.
"""
