"""elip_ds: text-guided vision-token pruning for language-image pre-training under DeepSpeed."""

__version__ = "0.1.0"
