"""The training plane: what runs under torchrun inside a replica group.

Torch is imported here and nowhere else in the kit. The entries are
``python -m launcher.train`` with torchtitan's own command line, and
``python -m launcher.train.script`` with a script of the user's own and its arguments.
"""
