"""Parts of the kit as real processes, servers and files, without Slurm and without root."""

from tests.unit.conftest import run

__all__ = ["run"]
