"""The console command `hf-kd`."""

from .commands import main

__all__ = ["main"]
