"""The training plane: what runs under torchrun inside a replica group.

Torch is imported here and nowhere else in the kit. The entry is
``python -m launcher.train`` with torchtitan's own command line.
"""
