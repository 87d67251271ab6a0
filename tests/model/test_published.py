"""The published numbers: what the file holds, the tables made of it, and results of lmms-eval beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.cli.main import main
from model.published import NOT_RUN, markdown_table, published_results, read_lmms_eval

PAGE = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")


def results_file(folder, **tasks):
    file = folder / "20260101_000000_results.json"
    file.write_text(json.dumps({"results": tasks}), encoding="utf-8")
    return file


def test_every_number_has_a_source_and_every_system_numbers():
    results = published_results()
    assert results.systems == ("LLaVA-1.5", "DenseConnector", "MMFuser", "IGVA")
    assert len(results.benchmarks) == 16
    for benchmark in results.benchmarks:
        assert set(benchmark.published) <= set(results.systems) and "IGVA" in benchmark.published
        for numbers in benchmark.published.values():
            assert numbers and all(number.source in results.sources for number in numbers)
        assert (benchmark.task is None) == (benchmark.task_metric is None)


def test_known_numbers():
    by_name = {benchmark.name: benchmark.published for benchmark in published_results().benchmarks}
    assert [by_name["GQA"][system][0].value for system in published_results().systems] == [61.9, 63.8, 62.8, 63.1]
    assert [number.value for number in by_name["MME, perception"]["LLaVA-1.5"]] == [1480.6, 1510.7]
    assert "DenseConnector" not in by_name["VizWiz"]


def test_the_page_shows_the_file():
    assert PAGE.endswith(markdown_table())
    tasks = [benchmark.task for benchmark in published_results().benchmarks if benchmark.task]
    assert all(f" --tasks {task} " in PAGE for task in tasks)


def test_results_of_lmms_eval_come_in_the_published_units(tmp_path):
    first = results_file(tmp_path, gqa={"exact_match,none": 0.5, "exact_match_stderr,none": 0.1, "alias": "gqa"})
    own = read_lmms_eval([first])
    assert own == {"GQA": 50.0}
    (tmp_path / "more").mkdir()
    second = results_file(tmp_path / "more", gqa={"exact_match,none": 0.6}, mme={"mme_perception_score,none": 1400.5})
    assert read_lmms_eval([first, second]) == {"GQA": 60.0, "MME, perception": 1400.5}


def test_the_command_prints_published_numbers_and_one_s_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["evaluate", "--published"]) == 0
    text = capsys.readouterr().out
    assert NOT_RUN in text and "1519.8" in text and "run with lmms-eval" not in text
    file = results_file(tmp_path, pope={"pope_f1_score,none": 0.8123})
    assert main(["evaluate", "--published", "--results", str(file)]) == 0
    text = capsys.readouterr().out
    (row,) = (line for line in text.splitlines() if "POPE" in line and "│" in line)
    assert "81.2" in row and "87.8" in row and "run with" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give CHECKPOINT and DATA, or --published"),
        (["somewhere"], "give DATA"),
        (["somewhere", "data.json", "--results", "file"], "add --published"),
    ],
)
def test_half_a_command_line_is_refused(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "no results file of lmms-eval"),
        ('{"scores": {}}', "no results file of lmms-eval"),
        ("[1]", "no results file of lmms-eval"),
        ('{"results": {"mine": {"acc,none": 1.0}}}', "hold mine, and none of the published ones: gqa"),
        ('{"results": {"gqa": {"exact_match,none": "N/A"}}}', "none of the published ones"),
    ],
)
def test_what_is_no_result_is_said_in_one_line(content, message, tmp_path, capsys):
    file = tmp_path / "some.json"
    file.write_text(content, encoding="utf-8")
    assert main(["evaluate", "--published", "--results", str(file)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_results_that_are_not_there(capsys):
    assert main(["evaluate", "--published", "--results", "nowhere.json"]) == 1
    assert "no results at nowhere.json" in capsys.readouterr().err
