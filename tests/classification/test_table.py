"""The tables of methods over seeds, and the file of trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_concept.errors import EraseError
from erase_concept.eval.classification.table import (
    Trial,
    best_multiplier,
    ranking,
    read_trials,
    rows,
    table,
    write_trial,
)


def trial(method: str, seed: int, ua: float, multiplier: float = 1.0, failed: str = "") -> Trial:
    values = {} if failed else {"ua": ua, "ra": 1.0, "ta": 0.9, "mia": 0.2, "mia_loss": 0.3}
    return Trial("random:10%", method, seed, multiplier, values, 2.0 + seed, f"{method}{seed}{multiplier}", failed)


TRIALS = [trial("retrain", 0, 0.10), trial("retrain", 1, 0.12), trial("ssd", 0, 0.02), trial("ssd", 1, 0.20)]


def test_each_trial_is_compared_with_retrain_of_its_seed() -> None:
    retrain, ssd = rows(TRIALS)
    assert (retrain.method, retrain.gap.mean, retrain.gap_of_means) == ("retrain", 0, 0)
    assert ssd.values["ua"].mean == pytest.approx(0.11)
    assert ssd.gap.mean == pytest.approx((0.08 + 0.08) / 2 / 4)
    assert ssd.gap_of_means == pytest.approx(0)
    assert ssd.seconds == pytest.approx(2.5)
    text = table([retrain, ssd], {"ssd": "SSD"})
    assert "| SSD | 11.00 ± 12.73 | 100.00 ± 0.00 | 90.00 ± 0.00 |" in text
    assert "| 2.00 ± 0.00 | 2.00 to 2.00 | 0.00 | 2.5 | 1 |" in text


def test_a_trial_without_its_pair_and_a_failed_one() -> None:
    with pytest.raises(EraseError, match="no trial of retrain with seed 3"):
        rows([*TRIALS, trial("scrub", 3, 0.1)])
    assert [row.method for row in rows([*TRIALS, trial("scrub", 0, 0.1, failed="nan")])] == ["retrain", "ssd"]


def test_the_best_multiplier_has_the_least_gap() -> None:
    tried = [trial("ssd", 0, ua, m) for ua, m in ((0.2, 1.0), (0.12, 0.2), (0.12, 5.0))]
    assert best_multiplier(tried, TRIALS[0]) == 0.2
    assert best_multiplier([trial("ssd", 0, 0, m, "nan") for m in (1.0, 0.2)], TRIALS[0]) == 0.2


def test_the_ranking_stands_beside_the_published_one() -> None:
    more = [*TRIALS, trial("scrub", 0, 0.11), trial("scrub", 1, 0.12)]
    lines = ranking(rows(more), {"ssd": 1.5, "scrub": 2.5}, {}).splitlines()
    assert lines[2:] == ["| scrub | 1 | 0.12 | 2 | 2.50 |", "| ssd | 2 | 2.00 | 1 | 1.50 |"]


def test_trials_are_kept_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    assert read_trials(file, Trial) == []
    for one in TRIALS:
        write_trial(one, file)
    assert read_trials(file, Trial) == TRIALS
    with file.open("a") as stream:
        stream.write('{"forget": "ran')  # killed while it wrote
    assert read_trials(file, Trial) == TRIALS
    write_trial(TRIALS[0], file)
    assert read_trials(file, Trial) == [*TRIALS, TRIALS[0]]
    with file.open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(EraseError, match="line 6"):
        read_trials(file, Trial)
