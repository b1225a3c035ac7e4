"""One file per dataset. Each turns its raw files into an iterator of `elip_ds.data.record.Record`.

Nothing is imported here, so that one source never pays for the libraries of another.
"""
