"""One file per kind of dataset. Each lists its samples and reads one of them (`elip_ds.data.raw`).

Nothing is imported here, so that one source never pays for the libraries of another.
"""
