"""The folder that the launcher puts on ``PYTHONPATH``; Python imports its ``sitecustomize``."""
