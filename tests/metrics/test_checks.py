"""What is missing is said before a run begins."""

from pathlib import Path

import pytest

from elip_ds.config.schema import MetricsConfig
from elip_ds.errors import UserError
from elip_ds.metrics.checks import check_metrics


def test_folders_are_made_and_what_is_none_is_named(tmp_path: Path):
    check_metrics(MetricsConfig(sd_dir=str(tmp_path / "a" / "sd")))
    assert (tmp_path / "a" / "sd").is_dir()
    (tmp_path / "file").touch()
    for name in ("sd_dir", "textfile_dir"):
        with pytest.raises(UserError, match=rf"metrics\.{name}=.*/file/x: not a folder"):
            check_metrics(MetricsConfig(**{name: str(tmp_path / "file" / "x")}))


def test_files_must_be_there(tmp_path: Path):
    (tmp_path / "there").touch()
    pair = {"certificate": str(tmp_path / "there"), "key": str(tmp_path / "not")}
    with pytest.raises(UserError, match=r"metrics\.key=.*/not: not a file that can be read"):
        check_metrics(MetricsConfig(**pair))
    with pytest.raises(UserError, match="password_file="):
        check_metrics(MetricsConfig(password_file=str(tmp_path / "not")))
