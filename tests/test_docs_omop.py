"""simulations/omop/README.md runs from synthetic tables to survival, and its SQL respects the page's index dates."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run

from .conftest import run_command, run_python

duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed: pip install duckdb")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "simulations/omop/README.md").read_text()
QUERY = (ROOT / "simulations/omop/features.sql").read_text()
TABLES = ("person", "observation_period", "visit_occurrence", "condition_occurrence", "drug_exposure", "measurement")
SITE = "north-hospital"
OUTCOMES = "outcome_30d, days, died"
TINY = ("federation.num_rounds=1", "training.local_steps=1", "training.ignore_weak_signal=true")
SMALL = (*TINY, "data.declared_sizes=30", "runtime.num_threads=1")
UPPER_BOUND = "AND i.index_date\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with simulations/omop and synthetic tables of 60 people at each hospital."""
    folder = tmp_path_factory.mktemp("omop")
    shutil.copytree(ROOT / "simulations/omop", folder / "simulations/omop", ignore=shutil.ignore_patterns("files"))
    run_python("simulations/omop/make_tables.py", "--people", "60", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def loaded(workplace: Path) -> Iterator[Any]:
    with duckdb.connect(config={"threads": 1}) as connection:
        for table in (*TABLES, "death"):
            file = workplace / "simulations/omop/files" / SITE / f"{table}.csv"
            connection.execute(f"CREATE TABLE {table} AS SELECT * FROM read_csv('{file}')")
        yield connection


@pytest.fixture
def database(loaded: Any) -> Iterator[Any]:
    """The database of one hospital; changes are rolled back after each test."""
    loaded.begin()
    yield loaded
    loaded.rollback()


def list_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)\n```$", PAGE, re.S | re.M)
    return [block for its_language, block in blocks if its_language == language]


def select_features(database: Any, query: str = QUERY) -> list[tuple[Any, ...]]:
    return database.sql(f"SELECT * EXCLUDE ({OUTCOMES}) FROM ({query})").fetchall()  # type: ignore[no-any-return]


def select_outcomes(database: Any) -> dict[int, tuple[Any, ...]]:
    return {row[0]: row[1:] for row in database.sql(f"SELECT person_id, {OUTCOMES} FROM ({QUERY})").fetchall()}


def add_later_records(database: Any) -> None:
    """Add a record of each kind after every index date, which a query with leakage from the future would read."""
    database.execute(f"CREATE TABLE cohort AS SELECT person_id AS person, index_date + 5 AS day FROM ({QUERY})")
    added = {
        "visit_occurrence": "visit_concept_id: 9201, visit_start_date: day, visit_end_date: day + 2",
        "condition_occurrence": "condition_concept_id: unnest([46271022, 201826, 313217, 255573, 316139]), "
        "condition_start_date: day, visit_occurrence_id: person + 7000000",
        "drug_exposure": "drug_concept_id: unnest([956874, 1308216, 1338005]), drug_exposure_start_date: day",
        "measurement": "measurement_concept_id: 3016723, measurement_date: day, value_as_number: 9, "
        "unit_concept_id: unnest([8840, 8749])",
        "death": "death_date: day + 1",
    }
    for table, values in added.items():
        key = "" if table == "death" else f", person + 7000000 AS {table}_id"
        columns = ", ".join(f"{value} AS {name}" for name, value in re.findall(r"(\w+): ((?:\[.*?\]|[^,])+)", values))
        database.execute(f"INSERT INTO {table} BY NAME SELECT person AS person_id{key}, {columns} FROM cohort")


def test_omop_page_runs_from_tables_to_survival(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (code,) = list_blocks("python")
    exec(code, {})
    policy = (ROOT / "conf/site.toml").read_text()
    for line in list_blocks("toml")[0].splitlines():
        key = line.partition(" = ")[0]
        policy = (
            policy if line.startswith("[") or not line else re.sub(rf"(?m)^{key} = .*$", lambda _, to=line: to, policy)
        )
    policy = re.sub('(?m)^path = "', 'path = "simulations/omop/files/', policy).replace(
        "# no_person_at", "no_person_at"
    )
    Path("site.toml").write_text(policy.replace("= ?", "= true"))
    commands = "\n".join(list_blocks("")).replace("\\\n", " ").splitlines()
    lines = [shlex.split(line) for line in commands if line.startswith("fedtune ")]
    assert [words[1] for words in lines] == ["data", "plan", "simulate", "simulate", "run", "data"]
    for _, *words in lines:
        if words[0] != "run":  # compose_for_sites below adds the remaining settings
            outcome = run_command(*words, *(SMALL if words[0] == "simulate" else ()))
            assert outcome.code == 0, (words, outcome.err)
    assert f"{SITE}.parquet" in outcome.out, "the site must check its own file against its policy"
    assert Path("runs/readmission/run.json").is_file()
    assert "concordance" in Path("runs/survival/run.json").read_text()
    words = [word for word in lines[4] if word.startswith(("experiment=", "data."))]
    sent = compose_run([*words, "runtime=deployment", "data.train_file=at-site", "data.partition.kind=iid"])
    assert (sent.privacy.unit, sent.data.test_fraction, len(sent.data.features)) == ("user", 0.0, 9)


def test_omop_page_quotes_the_query_and_the_experiment() -> None:
    experiment = (ROOT / "simulations/omop/experiment.yaml").read_text()
    assert list_blocks("sql")[0] in QUERY
    for line in list_blocks("yaml")[0].splitlines():
        assert f"{line}\n" in experiment, line


def test_records_after_the_index_date_change_no_feature(database: Any) -> None:
    before, outcomes = select_features(database), select_outcomes(database)
    assert len(before) > 20
    add_later_records(database)
    assert select_features(database) == before
    after = select_outcomes(database)
    assert (
        {outcome for outcome, _, _ in after.values()} == {"event"} != {outcome for outcome, _, _ in outcomes.values()}
    )
    starts = [match.end() for match in re.finditer(re.escape(UPPER_BOUND), QUERY)]
    assert len(starts) == 4, "visits, conditions, drugs and measurements"
    for end in starts:
        looking_ahead = f"{QUERY[: end - len(UPPER_BOUND)]}AND i.index_date + 30\n{QUERY[end:]}"
        assert select_features(database, looking_ahead) != before, "records of this kind would not reveal a leak"


def test_deleting_the_future_changes_no_feature(database: Any) -> None:
    before = select_features(database)
    database.execute(f"CREATE TABLE cohort AS SELECT person_id, index_date FROM ({QUERY})")
    for table, day in {
        "visit_occurrence": "visit_start_date",
        "condition_occurrence": "condition_start_date",
        "drug_exposure": "drug_exposure_start_date",
        "measurement": "measurement_date",
        "death": "death_date",
    }.items():
        database.execute(
            f"DELETE FROM {table} t USING cohort c WHERE t.person_id = c.person_id AND t.{day} > c.index_date"
        )
    assert select_features(database) == before


STAYS = """
INSERT INTO person BY NAME SELECT 1 AS person_id, 8507 AS gender_concept_id, 1950 AS year_of_birth;
INSERT INTO observation_period BY NAME SELECT 1 AS observation_period_id, 1 AS person_id,
    DATE '2018-01-01' AS observation_period_start_date, DATE '2021-04-06' AS observation_period_end_date;
INSERT INTO visit_occurrence VALUES (1, 1, 9201, DATE '2020-06-01', DATE '2020-06-10', 0),
    (2, 1, 9201, DATE '2020-08-01', DATE '2020-08-03', 0);
INSERT INTO condition_occurrence VALUES (1, 1, 316139, DATE '2020-06-01', 0, 1),
    (2, 1, 316139, DATE '2020-08-01', 0, 2);
"""
"""One person, observed for 300 days after the first of two hospital stays for heart failure."""


@pytest.fixture
def one_person(database: Any) -> Any:
    for table in (*TABLES, "death"):
        database.execute(f"DELETE FROM {table}")
    database.execute(STAYS)
    return database


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", ("no event", 300, 0)),
        ("INSERT INTO death VALUES (1, DATE '2020-07-10', 0)", ("event", 30, 1)),
        ("INSERT INTO death VALUES (1, DATE '2020-07-11', 0)", ("no event", 31, 1)),
        ("INSERT INTO death VALUES (1, DATE '2020-06-10', 0)", None),
        ("UPDATE visit_occurrence SET visit_start_date = '2020-07-10' WHERE visit_start_date > '2020-07-01'",
         ("event", 300, 0)),
        ("INSERT INTO visit_occurrence VALUES (3, 1, 9201, DATE '2020-02-01', DATE '2020-02-03', 0);"
         "INSERT INTO condition_occurrence VALUES (3, 1, 316139, DATE '2020-02-01', 0, 3)", ("no event", 428, 0)),
        ("UPDATE observation_period SET observation_period_end_date = '2020-06-30'", (None, 20, 0)),
        ("UPDATE observation_period SET observation_period_start_date = '2019-07-01'", None),
        ("DELETE FROM condition_occurrence WHERE visit_occurrence_id = 1", ("no event", 246, 0)),
    ],
    ids=["followed", "death on day 30", "death on day 31", "death in hospital", "readmission on day 30",
         "earlier stay", "lost to follow-up", "short observation", "first stay for another reason"],
)  # fmt: skip
def test_cohort_and_outcomes_follow_the_documented_rules(one_person: Any, change: str, expected: object) -> None:
    if change:
        one_person.execute(change)
    assert select_outcomes(one_person).get(1) == expected


def test_creatinine_in_another_unit_is_converted_and_an_unknown_unit_skipped(one_person: Any) -> None:
    values = [(1, "2020-05-01", 2.5, 8840), (2, "2020-06-02", 88.42, 8749), (3, "2020-06-03", 7, 0)]
    for number, day, value, unit in values:
        one_person.execute(f"INSERT INTO measurement VALUES ({number}, 1, 3016723, '{day}', 0, {value}, {unit}, 1)")
    ((creatinine,),) = one_person.sql(f"SELECT creatinine FROM ({QUERY})").fetchall()
    assert creatinine == pytest.approx(1.0)
