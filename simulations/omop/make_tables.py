"""Make up OMOP tables of three hospitals: CSV files with column names of CDM 5.4, drawn from a seed.

    python simulations/omop/make_tables.py [--people 3000] [--seed 0] [--into simulations/omop/files]

Nobody in these tables exists, and no rate in them is a real hospital's.  People with kidney disease and a high
creatinine come back to hospital more often, so that there is something to learn.  Each hospital has its own habits:
south-hospital has older people, and west-hospital reports creatinine in another unit.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path

HEART_FAILURE, CHEST_PAIN = 316139, 77670  # SNOMED conditions: Heart failure; Chest pain
KIDNEY = 46271022  # Chronic kidney disease
OTHERS = (201826, 313217, 320128, 255573)  # Type 2 diabetes, Atrial fibrillation, Essential hypertension, COPD
DRUGS = (956874, 1308216, 1338005, 1503297)  # RxNorm ingredients: furosemide, lisinopril, bisoprolol, metformin
CREATININE, SODIUM, HEMOGLOBIN = 3016723, 3019550, 3000963  # LOINC, in serum, serum and blood
MG_DL, UMOL_L, MMOL_L, G_DL = 8840, 8749, 8753, 8713  # UCUM units
INPATIENT, OUTPATIENT = 9201, 9202  # visits
MALE, FEMALE, FROM_RECORDS = 8507, 8532, 32817  # genders; type concept EHR
FIRST, LAST = date(2018, 1, 1), date(2023, 12, 31)
HOSPITALS = {"north-hospital": (70, MG_DL), "south-hospital": (76, MG_DL), "west-hospital": (70, UMOL_L)}

COLUMNS = {
    "person": "person_id gender_concept_id year_of_birth month_of_birth race_concept_id ethnicity_concept_id",
    "observation_period": "observation_period_id person_id observation_period_start_date observation_period_end_date"
    " period_type_concept_id",
    "visit_occurrence": "visit_occurrence_id person_id visit_concept_id visit_start_date visit_end_date"
    " visit_type_concept_id",
    "condition_occurrence": "condition_occurrence_id person_id condition_concept_id condition_start_date"
    " condition_type_concept_id visit_occurrence_id",
    "drug_exposure": "drug_exposure_id person_id drug_concept_id drug_exposure_start_date drug_exposure_end_date"
    " drug_type_concept_id visit_occurrence_id",
    "measurement": "measurement_id person_id measurement_concept_id measurement_date measurement_type_concept_id"
    " value_as_number unit_concept_id visit_occurrence_id",
    "death": "person_id death_date death_type_concept_id",
}


def make_hospital(people: int, *, first_id: int, age: float, unit: int, draw: random.Random) -> dict[str, list[tuple]]:
    """Draw the tables of one hospital, as rows by table; its people have ids from `first_id` on."""
    tables = defaultdict[str, list[tuple]](list)

    def add(table: str, *values: object) -> int:
        number = first_id + len(tables[table])
        tables[table].append((number, *values))
        return number

    def add_visit(person: int, kind: int, start: date, days: int, conditions: set[int], illness: float) -> None:
        visit = add("visit_occurrence", person, kind, start, start + timedelta(days), FROM_RECORDS)
        for condition in sorted(conditions):
            add("condition_occurrence", person, condition, start, FROM_RECORDS, visit)
        for drug in DRUGS:
            if draw.random() < 0.3 + 0.1 * illness:
                end = start + timedelta(30)
                add("drug_exposure", person, drug, start, end, FROM_RECORDS, visit)
        creatinine = max(0.4, draw.gauss(1.3 + 0.5 * illness, 0.2))
        values = [(CREATININE, creatinine * (88.42 if unit == UMOL_L else 1), unit)]
        values += [
            (SODIUM, draw.gauss(139 - illness, 3), MMOL_L),
            (HEMOGLOBIN, draw.gauss(13 - illness / 2, 1.5), G_DL),
        ]
        for concept, value, its_unit in values:
            if draw.random() < 0.85:
                add("measurement", person, concept, start, FROM_RECORDS, round(value, 2), its_unit, visit)

    for _ in range(people):
        born = LAST.year - round(min(95, max(40, draw.gauss(age, 10))))
        person = add("person", draw.choice((MALE, FEMALE)), born, draw.randint(1, 12), 0, 0)
        illness = draw.gauss(0, 1)
        chronic = {KIDNEY} if draw.random() < 1 / (1 + math.exp(1 - 1.5 * illness)) else set()
        chronic |= {condition for condition in OTHERS if draw.random() < 0.3}
        entry = FIRST + timedelta(draw.randint(0, 500))
        stays = [(entry + timedelta(draw.randint(30, 1200)), HEART_FAILURE if draw.random() < 0.8 else CHEST_PAIN)]
        if draw.random() < 1 / (1 + math.exp(1.8 - 2.2 * illness - (KIDNEY in chronic))):
            stays.append((stays[0][0] + timedelta(9 + draw.randint(1, 30)), HEART_FAILURE))  # a readmission
        death = stays[-1][0] + timedelta(10 + int(draw.expovariate(math.exp(0.8 * illness - 7.5))))
        end = min(LAST, death, entry + timedelta(draw.randint(1100, 2600)))  # some move away
        add("observation_period", person, entry, end, FROM_RECORDS)
        if death <= end:
            tables["death"].append((person, death, FROM_RECORDS))
        for start, reason in stays:
            add_visit(person, INPATIENT, start, draw.randint(2, 8), {reason, *chronic}, illness)
        visits = (entry + timedelta(draw.randint(0, 2200)) for _ in range(draw.randint(4, 12)))
        for start in (day for day in visits if day < end):
            later = 2.0 if start > stays[0][0] else 0.0  # what is written down after a stay tells of its outcome
            add_visit(
                person, OUTPATIENT, start, 0, set(draw.sample(sorted(chronic), len(chronic) // 2)), illness + later
            )
    return tables


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--people", type=int, default=3000, help="in each hospital")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--into", type=Path, default=Path(__file__).parent / "files")
    asked = options.parse_args()
    for place, (name, (age, unit)) in enumerate(HOSPITALS.items(), 1):
        draw = random.Random(f"{asked.seed} {name}")
        tables = make_hospital(asked.people, first_id=place * 1_000_000, age=age, unit=unit, draw=draw)
        (asked.into / name).mkdir(parents=True, exist_ok=True)
        for table, columns in COLUMNS.items():
            with (asked.into / name / f"{table}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([columns.split(), *tables[table]])


if __name__ == "__main__":
    main()
