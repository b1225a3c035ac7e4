"""elip_ds: text-guided vision-token pruning for language-image pre-training under DeepSpeed."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """elip_ds.load, imported on first use: it brings torch along."""
    if name == "load":
        from elip_ds.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
