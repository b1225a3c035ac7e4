"""Logging set-up: rank 0 speaks at INFO, the others from WARNING on."""

import logging


def setup_logging(rank: int) -> None:
    """Send every logger to stderr with the time, and the rank where it is not rank 0."""
    where = "" if rank == 0 else f" rank {rank}"
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s{where} %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
