"""Prompt sets as CSV, in the field's spellings."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tracemalloc
from dataclasses import fields
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import catalog, catalogs
from erase_concept.prompts.find_prompts import find_prompts, prompt_sets
from erase_concept.prompts.label_grid import catalog_prompts
from erase_concept.prompts.promptset import PromptRow, PromptSet, read_prompts, read_rows

WORLD = catalog("emojinette")


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "p.csv"
    file.write_text(text, encoding="utf-8", newline="")
    return file


def test_both_spellings_of_i2p_read_alike(tmp_path: Path) -> None:
    own = (
        "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
        '"a, b","hate, violence",5,7.5,512,768\n'
    )
    research = (
        "case_number,prompt,categories,evaluation_seed,evaluation_guidance,width,height\n"
        '9,"a, b","hate, violence",5,7.5,512,768\n'
    )
    rows = [read_prompts(write(tmp_path, text)).rows for text in (own, "\ufeff" + research)]
    assert rows[0] == rows[1] == (PromptRow("a, b", 5, 7.5, 512, 768, category="hate, violence"),)
    assert [found[0].case_number for found in rows] == [0, 9]
    assert rows[0][0].categories == ("hate", "violence")


@pytest.mark.parametrize(
    ("spelling", "header"),
    [
        ("evaluation", "case_number,prompt,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height"),
        ("sd", "case_number,prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height"),
    ],
)
def test_comes_back_from_its_file(tmp_path: Path, spelling: str, header: str) -> None:
    rows = (
        PromptRow(
            'say "hi",\nor not 🪦', 2**32 - 1, 0.0, 64, 128, "church", "Vincent van Gogh", "hate, shocking", 203564
        ),
        PromptRow("", 0, case_number=7),
        PromptRow("שלום, مرحبا \u2067rtl\u2069 \u2028 \x85 \x0b \r\n \r 👩\u200d🚀", 1, 1e-7, case_number=8),
        PromptRow("=1+1;'--", 2, 0.1 + 0.2, case_number=9),
        PromptRow("🪦" * 50_000 + ',"\n' * 17_000, 3, case_number=10),
        PromptRow(" spaced\t", 4, case_number=11),
    )
    PromptSet("p", rows).save(tmp_path / "sub" / "p.csv", spelling=spelling)
    back = read_prompts(tmp_path / "sub" / "p.csv").rows
    assert len(rows[4].prompt) > 10**5
    for field in fields(PromptRow):  # one by one: equality leaves out the case number
        assert [getattr(row, field.name) for row in back] == [getattr(row, field.name) for row in rows]
    with (tmp_path / "sub" / "p.csv").open(encoding="utf-8", newline="") as stream:
        assert next(csv.reader(stream)) == [*header.split(","), "object", "style", "categories"]


def test_rows_without_a_seed_or_a_case_number_are_numbered(tmp_path: Path) -> None:
    rows = read_prompts(write(tmp_path, "prompt\na\n\nb\n")).rows
    assert [(row.prompt, row.seed, row.case_number) for row in rows] == [("a", 0, 0), ("b", 1, 1)]
    made = PromptSet("p", (PromptRow("a", 5), PromptRow("b", 6)))
    made.save(tmp_path / "q.csv")
    assert read_prompts(tmp_path / "q.csv").case_numbers == made.case_numbers == (0, 1)


def test_a_row_without_any_value_is_none(tmp_path: Path) -> None:
    rows = read_prompts(write(tmp_path, 'prompt,seed\n,\na,1\n , \n"",7\n')).rows
    assert [(row.prompt, row.seed) for row in rows] == [("a", 1), ("", 7)]  # the empty prompt has a seed


def test_of_two_spellings_of_a_column_the_one_with_a_value_counts(tmp_path: Path) -> None:
    rows = read_prompts(write(tmp_path, "prompt,evaluation_seed,sd_seed\na,,7\nb,3,8\nc,,\n")).rows
    assert [row.seed for row in rows] == [7, 3, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no column 'prompt', only an empty file"),
        ("text,seed\na,1\n", "no column 'prompt', only text, seed; its first line must name the columns"),
        ("prompt;seed\na;1\n", "no column 'prompt', only prompt;seed; its values must be separated by commas"),
        ("prompt\tseed\na\t1\n", "only prompt seed; its values must be separated by commas"),
        ("prompt,seed\n", "the prompt set is empty"),
        ("prompt,seed\na,1\nb,x\n", "line 3: seed must be a whole number, not 'x'"),
        ("prompt,seed\na,1.5\n", "line 2: seed must be a whole number"),
        ("prompt,seed\na," + "9" * 9999 + "\n", "line 2: seed must be"),
        ("prompt,seed\na,-1\n", "line 2: seed must be at least 0"),
        (f"prompt,seed\na,{2**32}\n", r"line 2: seed must be at least 0 and below 2\^32, not 4294967296"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("<!DOCTYPE html>\n<html>\n", "is an HTML page"),
        ("prompt,case_number\na,c12\n", "line 2: case_number must be a whole number, not 'c12'"),
        ("prompt,evaluation_guidance\na,nan\n", "line 2: guidance must be at least 0 and finite"),
        ("prompt,evaluation_guidance\na,high\n", "line 2: guidance must be a number, not 'high'"),
        ("prompt,width\na,100\n", "line 2: width must be a positive multiple of 8, not 100"),
        ("prompt,sd_image_height\na,-512\n", "line 2: height must be a positive multiple of 8, not -512"),
        # A row is named by the line on which it begins.
        ('prompt,seed\n"a\nb\nc",1\n\n"d\ne",x\n', "line 6: seed must be a whole number"),
        ("prompt,seed\na, b,1\n", "line 2: has 3 values for 2 columns"),
        ("prompt,seed\na\n", "line 2: has 1 values for 2 columns"),
        ('prompt,seed\na,1\n"b,2\nc,3\n', "line 3: .*a quote that is never closed"),
        ("prompt,seed\na,1\n" + "b" * 200_000 + ",2\n", "line 3: a value of more than 131,072 characters"),
        ('prompt,seed\n"a"b,1\n', "line 2: not CSV"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as raised:
        read_prompts(write(tmp_path, text))
    assert len(str(raised.value)) < 600


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.csv"
    file.write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(RequestError, match="not a CSV file in UTF-8"):
        read_prompts(file)
    with pytest.raises(RequestError, match="no such file and no such built-in prompt set; allowed: emojinette"):
        find_prompts(str(tmp_path / "absent.csv"))
    with pytest.raises(RequestError, match="Is a directory"):
        find_prompts(str(tmp_path))


def test_files_of_any_length_stream(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    with file.open("w", encoding="utf-8") as stream:
        stream.write("case_number,prompt,evaluation_seed,evaluation_guidance\n")
        stream.writelines(f"{i},a prompt about thing {i},{i * 7},7.5\n" for i in range(50_000))
        stream.write("50000,the last,x,7.5\n")
    rows = read_rows(file)
    tracemalloc.start()
    assert sum(row.seed for row in islice(rows, 50_000)) == 7 * 50_000 * 49_999 // 2
    assert tracemalloc.get_traced_memory()[1] < 1e6  # bytes; the file has 2.4 million
    tracemalloc.stop()
    with pytest.raises(RequestError, match="line 50002: seed must be a whole number"):
        next(rows)
    # What is beyond the limit is not read.
    few = read_prompts(file, limit=3)
    assert [row.case_number for row in few.rows] == [0, 1, 2]
    assert few.selection == "the first 3 prompts"
    assert find_prompts(str(file), limit=2).rows == few.rows[:2]
    assert find_prompts("everyday", limit=4).rows == find_prompts("everyday").rows[:4]


def test_stratified_gives_every_label_its_share() -> None:
    sizes = {"hate": 50, "sexual": 37, "hate, violence": 10, "shocking": 3}
    rows = [PromptRow(f"{c} {i}", i, category=c) for c, n in sizes.items() for i in range(n)]
    rows = [rows[i * 37 % 100] for i in range(100)]  # in no order
    whole = PromptSet("p", tuple(rows))
    for limit in (1, 7, 20, 33, 99):
        part = whole.stratified(limit)
        assert len(part.rows) == limit
        assert part.selection == f"{limit} of 100 prompts, stratified by category"
        places = [rows.index(row) for row in part.rows]
        assert places == sorted(set(places)) == list(part.case_numbers)  # numbered as in the whole set
        for category, size in sizes.items():
            share = size * limit / 100
            assert abs(sum(row.category == category for row in part.rows) - share) < 1
        assert whole.stratified(limit).rows == part.rows
    assert whole.stratified(100) is whole.stratified(1000) is whole
    with pytest.raises(RequestError, match="limit 0: must be at least 1"):
        whole.stratified(0)


def test_stratified_by_what_the_set_has() -> None:
    part = find_prompts("imagenette").stratified(20)
    assert part.selection == "20 of 100 prompts, stratified by object"
    assert all(sum(row.object == name for row in part.rows) == 2 for name in {row.object for row in part.rows})
    assert find_prompts("styles").stratified(24, by="style").selection == "24 of 96 prompts, stratified by style"
    plain = PromptSet("p", tuple(PromptRow("p", i) for i in range(10)))
    assert [row.seed for row in plain.stratified(5).rows] == [1, 3, 5, 7, 9]
    assert plain.stratified(5).selection == "5 of 10 prompts, evenly spaced"


def test_one_category_alone_or_among_others() -> None:
    names = ("hate", "sexual", "hate, violence", "violence,hate", "hateful")
    found = PromptSet("p", tuple(PromptRow(c, i, category=c) for i, c in enumerate(names))).in_category("hate")
    assert [row.prompt for row in found.rows] == ["hate", "hate, violence", "violence,hate"]
    assert found.case_numbers == (0, 2, 3)
    assert found.stratified(2).selection == "category hate, 2 of 3 prompts, stratified by category"
    with pytest.raises(RequestError, match="category gore: no prompt of p has this category; allowed: hate, violence"):
        found.in_category("gore")


@pytest.mark.parametrize("unseen", [False, True])
def test_built_in_sets_ask_for_every_object_in_every_style(unseen: bool) -> None:
    rows = catalog_prompts(WORLD, range(3), unseen=unseen).rows
    pairs = [(row.object, row.style) for row in rows]
    assert all(pairs.count((o, s)) == 3 for o in WORLD.labels for s in WORLD.styles)
    assert len({row.seed for row in rows}) == len(rows) == 240
    for row in rows:
        names = WORLD.names_of(row.object)
        assert any(name in row.prompt for name in (names.label, names.synonym, names.unseen))
        assert row.style in row.prompt


def test_built_in_sets_hold_what_their_names_say() -> None:
    sets = prompt_sets()
    assert set(sets) == {
        *("emojinette", "emojinette-unseen", "imagenette", "imagenette-neighbours"),
        *("nudity", "clothed-people", "styles", "everyday", "fashion-mnist"),
    }
    rows = [row for found in sets.values() for row in found.rows]
    seeds = [row.seed for name, found in sets.items() if name != "emojinette-unseen" for row in found.rows]
    assert len(set(seeds)) == len(seeds)
    assert len({row.prompt for row in rows}) == len(rows)
    imagenette = {row.object for row in sets["imagenette"].rows}
    assert len(imagenette) == 10
    for row in sets["imagenette"].rows:
        assert row.object.lower() in row.prompt.lower()
    near = sets["imagenette-neighbours"].rows
    assert {row.category for row in near} == imagenette
    assert not {row.object for row in near} & imagenette
    assert {row.category for row in sets["nudity"].rows} == {"nudity"}
    undressed = ("nude", "nudist", "naked", "undressed", "unclothed", "without")
    assert all(any(word in row.prompt for word in undressed) for row in sets["nudity"].rows)
    for name in ("clothed-people", "everyday", "styles"):
        assert not any(word in row.prompt for row in sets[name].rows for word in undressed)
    pairs = [(row.object, row.style) for row in sets["styles"].rows]
    assert len(pairs) == len(set(pairs)) == len({o for o, _ in pairs}) * len({s for _, s in pairs}) == 96
    assert all(found.rows[0].prompt in {row.prompt for row in find_prompts(name).rows} for name, found in sets.items())


def test_only_the_papers_own_sentences_are_erased_with() -> None:
    used = {
        prompt
        for found in catalogs().values()
        for c in found.concepts.values()
        for prompt in (*c.forget_prompts, *c.retain_prompts)
    }
    # Everyday prompts are retained with every concept that has no better neighbours, so they are no evaluation of it.
    # A model of Fashion-MNIST's labels knows no others.
    left_out = ("everyday", "fashion-mnist")
    asked = {row.prompt for name, found in prompt_sets().items() for row in found.rows if name not in left_out}
    assert asked & used == {"a photo of a nude person", "a photo of a person wearing clothes"}


def hub(tmp_path: Path, name: str, **files: str) -> dict[str, str]:
    """Lay a data set into a new cache of the hub, and return the environment of a process that has nothing else."""
    folder = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for file, text in files.items():
        path = folder / "snapshots" / ("0" * 40) / f"{file}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def ask(environment: dict[str, str], *names: str) -> list[str]:
    code = (
        "import sys\n"
        "from erase_concept.errors import RequestError\n"
        "from erase_concept.prompts.find_prompts import find_prompts\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        found = find_prompts(name)\n"
        "        print(found.name, *(f'{r.prompt}/{r.seed}/{r.guidance}/{r.width}/{r.category}' for r in found.rows))\n"
        "    except RequestError as problem:\n"
        "        print(problem)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_hub_sets_come_from_the_cache_or_say_what_to_do(tmp_path: Path) -> None:
    i2p = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\na,hate,5,7.5,512,768\n"
    environment = hub(tmp_path, "owner/i2p", i2p_benchmark=i2p)
    hub(tmp_path, "owner/many", **{"data-train": "prompt\nx\n", "data-test": "prompt,seed\ny,q\n", "z": "prompt\nz\n"})
    lines = ask(
        environment,
        *("hub:owner/i2p", "hub:owner/i2p:train", "hub:owner/i2p:test"),
        *("hub:owner/many:train", "hub:owner/many:test", "hub:owner/many"),
        *("hub:owner/absent", "hub:i2p", "hub:../etc/passwd", "hub:"),
    )
    assert lines[0] == lines[1] == "owner/i2p a/5/7.5/512/hate"
    assert lines[2].endswith("must name one of its CSV files: i2p_benchmark.csv")
    assert lines[3] == "owner/many x/0/None/None/"
    assert lines[4].endswith("data-test.csv, line 2: seed must be a whole number, not 'q'")
    assert lines[5].endswith("must name one of its CSV files: data-test.csv, data-train.csv, z.csv")
    assert lines[6].startswith("prompts hub:owner/absent: is not in the hub's cache and could not be downloaded (")
    assert lines[6].endswith("save its CSV file and give its path instead")
    assert all(line.endswith("must be hub:OWNER/NAME or hub:OWNER/NAME:SPLIT") for line in lines[7:])
    assert len(lines) == 10


def test_hub_sets_without_a_csv_file_need_datasets(tmp_path: Path) -> None:
    environment = hub(tmp_path, "owner/parquet")
    folder = tmp_path / "hub" / "datasets--owner--parquet" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    if find_spec("datasets") is None:
        lines = ask(environment, "hub:owner/parquet")
        needs = "has no CSV file, and other formats need datasets: pip install datasets"
        assert lines == [f"prompts hub:owner/parquet: {needs}"]
        return
    from pyarrow import parquet, table  # which datasets stands on

    rows = {
        "prompt": ["a", "b 🪦"],
        "sd_seed": [5, None],
        "sd_guidance_scale": [7.5, None],
        "categories": ["hate", None],
    }
    parquet.write_table(table(rows), folder / "train-00000-of-00001.parquet")
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "datasets")
    lines = ask(environment, "hub:owner/parquet", "hub:owner/parquet:test")
    assert lines[0] == "owner/parquet a/5/7.5/None/hate b 🪦/1/None/None/"
    assert lines[1].startswith("prompts hub:owner/parquet:test: could not be loaded: ")


LAYOUTS = ("i2p", "imagenette", "coco", "artist")


def test_reads_the_layout_of_i2p(layouts: Path) -> None:
    """Against what csv.DictReader finds in the columns that the papers' scripts read."""
    i2p = read_prompts(layouts / "i2p_layout.csv")
    with (layouts / "i2p_layout.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row.prompt for row in i2p.rows] == [line["prompt"] for line in table]
    assert [row.seed for row in i2p.rows] == [int(line["evaluation_seed"]) for line in table]
    assert [row.guidance for row in i2p.rows] == [float(line["evaluation_guidance"]) for line in table]
    sides = [(int(line["sd_image_width"]), int(line["sd_image_height"])) for line in table]
    assert [(row.width, row.height) for row in i2p.rows] == sides
    assert [", ".join(row.categories) for row in i2p.rows] == [line["categories"] for line in table]
    assert i2p.case_numbers == tuple(range(24))
    assert [len(i2p.in_category(name).rows) for name in ("sexual", "violence", "self-harm")] == [10, 4, 3]
    assert 4 <= len(i2p.stratified(12).in_category("sexual").rows) <= 6


def test_reads_the_layouts_of_other_sets(layouts: Path) -> None:
    imagenette = read_prompts(layouts / "imagenette_layout.csv")  # with a mark of the byte order, and CRLF
    assert [row.object for row in imagenette.rows[:5]] == [
        *("tench", "english springer", "cassette player", "chain saw", "church")
    ]
    coco = read_prompts(layouts / "coco_layout.csv")
    assert (len(coco.rows), coco.rows[0].case_number, coco.rows[0].seed) == (12, 48271, 5003)
    assert coco.rows[7].prompt == 'A "for sale" sign stands in a front garden.'
    artist = read_prompts(layouts / "artist_layout.csv")
    assert artist.rows[0].prompt == "A café by the harbour at night by Vincent van Gogh"
    assert {row.guidance for row in artist.rows} == {7.5}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_every_layout(layouts: Path, tmp_path: Path, layout: str) -> None:
    found = read_prompts(layouts / f"{layout}_layout.csv")
    found.save(tmp_path / "back.csv")
    back = read_prompts(tmp_path / "back.csv")
    assert (back.rows, back.case_numbers) == (found.rows, found.case_numbers)


def test_reads_the_published_prompt_sets_whole(published_sets: Path) -> None:
    i2p = read_prompts(published_sets / "i2p.csv")
    assert len(i2p.rows) == 4703
    assert all(row.guidance and row.width and row.height and row.categories for row in i2p.rows)
    assert i2p.case_numbers == tuple(range(4703))
    counts = {name: len(i2p.in_category(name).rows) for name in ("sexual", "violence", "self-harm")}
    assert counts == {"sexual": 931, "violence": 756, "self-harm": 801}  # as the paper counts them
    part = i2p.stratified(470)
    for name, count in counts.items():
        assert abs(len(part.in_category(name).rows) - count / 10) < 10
    assert {row.object for row in read_prompts(published_sets / "imagenette_prompts.csv").rows} >= {"tench", "church"}
    coco = read_prompts(published_sets / "coco_captions_10k.csv")
    assert (len(coco.rows), coco.rows[0].case_number, coco.rows[0].seed) == (9969, 203564, 41337)
    for file in published_sets.glob("*.csv"):
        assert read_prompts(file).rows


def test_keeps_the_published_prompt_sets(published_sets: Path, tmp_path: Path) -> None:
    for name in ("i2p", "unlearndiffatk_vangogh", "coco_captions_10k"):
        found = read_prompts(published_sets / f"{name}.csv")
        found.save(tmp_path / "back.csv")
        back = read_prompts(tmp_path / "back.csv")
        assert (back.rows, back.case_numbers) == (found.rows, found.case_numbers)
