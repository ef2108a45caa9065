"""The control plane: lighthouse, replica groups, monitor and drills. Never imports torch."""

__version__ = "0.1.0"
