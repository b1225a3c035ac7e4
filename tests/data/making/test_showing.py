"""How far a job is."""

import pytest

from elip_ds.data.making.showing import Showing


def test_a_line_has_share_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    showing = Showing("making", 10_000)
    assert showing.line() == "making: 0 of 10,000 samples (0 %), 0/s, ? left"
    showing.skip(4000)  # by an earlier start
    now = 110.0
    showing.advance(1000)
    assert showing.line() == "making: 5,000 of 10,000 samples (50 %), 100/s, 0 min 50 s left"


def test_lines_come_no_more_often_than_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    showing = Showing("making", 1000, every_seconds=10)
    for _ in range(100):
        now += 1
        showing.advance(1)
    assert capsys.readouterr().err.count("\n") == 10


def test_without_a_total_there_is_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    showing = Showing("inspecting", 0)
    now = 2.0
    showing.advance(500)
    assert showing.line() == "inspecting: 500 samples, 250/s"


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for total, text in ((4000, "1,000 of 4,000 samples"), (0, "1,000 of ? samples")):
        showing = Showing("making", total)
        showing.advance(1000)
        showing.close()
        assert text in capsys.readouterr().err
