-- One row for each person of the cohort, from OMOP CDM 5.4 tables in DuckDB: features up to the index date, outcomes after.
-- simulations/omop/README.md explains each step.  Concept ids are standard concepts; in a real database each IN (...) list is the
-- concept set of your study, with descendants:
--   SELECT descendant_concept_id FROM concept_ancestor WHERE ancestor_concept_id IN (316139)
WITH stays AS (
  -- Every inpatient stay (9201 Inpatient Visit, 262 Emergency Room and Inpatient Visit), and whether it was for heart
  -- failure (316139).
  SELECT
    v.person_id,
    v.visit_start_date AS start_date,
    v.visit_end_date AS end_date,
    EXISTS (
      SELECT 1 FROM condition_occurrence c
      WHERE c.visit_occurrence_id = v.visit_occurrence_id AND c.condition_concept_id IN (316139)
    ) AS for_heart_failure
  FROM visit_occurrence v
  WHERE v.visit_concept_id IN (9201, 262) AND v.visit_end_date IS NOT NULL
),
index_stays AS (
  -- The cohort: each person's first stay for heart failure that ended alive, after 365 days of observation without
  -- such a stay.  The index date is the day of discharge.
  SELECT
    s.person_id,
    s.end_date AS index_date,
    s.end_date - s.start_date AS length_of_stay,
    s.end_date - 365 AS window_start,
    o.observation_period_end_date AS followed_until
  FROM stays s
  JOIN observation_period o ON o.person_id = s.person_id
    AND o.observation_period_start_date <= s.start_date - 365
    AND o.observation_period_end_date >= s.end_date
  WHERE s.for_heart_failure
    AND NOT EXISTS (
      SELECT 1 FROM stays earlier
      WHERE earlier.person_id = s.person_id AND earlier.for_heart_failure
        AND earlier.start_date < s.start_date AND earlier.end_date >= s.start_date - 365
    )
    AND NOT EXISTS (SELECT 1 FROM death d WHERE d.person_id = s.person_id AND d.death_date <= s.end_date)
  QUALIFY row_number() OVER (PARTITION BY s.person_id ORDER BY s.start_date, s.end_date) = 1
),
past_visits AS (
  SELECT i.person_id, count(*) AS visits
  FROM index_stays i
  JOIN visit_occurrence v ON v.person_id = i.person_id
    AND v.visit_start_date BETWEEN i.window_start AND i.index_date
  GROUP BY i.person_id
),
past_conditions AS (
  SELECT
    i.person_id,
    max(CAST(c.condition_concept_id IN (46271022) AS INTEGER)) AS kidney_disease,
    max(CAST(c.condition_concept_id IN (201826) AS INTEGER)) AS diabetes,
    max(CAST(c.condition_concept_id IN (313217) AS INTEGER)) AS atrial_fibrillation,
    max(CAST(c.condition_concept_id IN (255573) AS INTEGER)) AS copd
  FROM index_stays i
  JOIN condition_occurrence c ON c.person_id = i.person_id
    AND c.condition_start_date BETWEEN i.window_start AND i.index_date
  GROUP BY i.person_id
),
past_drugs AS (
  SELECT
    i.person_id,
    max(CAST(d.drug_concept_id IN (956874) AS INTEGER)) AS furosemide,
    max(CAST(d.drug_concept_id IN (1308216) AS INTEGER)) AS lisinopril,
    max(CAST(d.drug_concept_id IN (1338005) AS INTEGER)) AS bisoprolol
  FROM index_stays i
  JOIN drug_exposure d ON d.person_id = i.person_id
    AND d.drug_exposure_start_date BETWEEN i.window_start AND i.index_date
  GROUP BY i.person_id
),
past_values AS (
  -- Each hospital's units become one: creatinine in mg/dL (8840), also where it was reported in umol/L (8749).
  SELECT
    i.person_id,
    m.measurement_id,
    m.measurement_date,
    m.measurement_concept_id,
    CASE
      WHEN m.measurement_concept_id = 3016723 AND m.unit_concept_id = 8840 THEN m.value_as_number
      WHEN m.measurement_concept_id = 3016723 AND m.unit_concept_id = 8749 THEN m.value_as_number / 88.42
      WHEN m.measurement_concept_id = 3019550 AND m.unit_concept_id = 8753 THEN m.value_as_number
      WHEN m.measurement_concept_id = 3000963 AND m.unit_concept_id = 8713 THEN m.value_as_number
    END AS value
  FROM index_stays i
  JOIN measurement m ON m.person_id = i.person_id
    AND m.measurement_date BETWEEN i.window_start AND i.index_date
),
last_values AS (
  -- The id decides between two values of one day, so that the same tables always give the same file.
  SELECT
    person_id,
    arg_max(value, (measurement_date, measurement_id)) FILTER (measurement_concept_id = 3016723) AS creatinine,
    arg_max(value, (measurement_date, measurement_id)) FILTER (measurement_concept_id = 3019550) AS sodium,
    arg_max(value, (measurement_date, measurement_id)) FILTER (measurement_concept_id = 3000963) AS hemoglobin
  FROM past_values
  WHERE value IS NOT NULL
  GROUP BY person_id
),
follow_up AS (
  -- The first readmission and the death after the index date, as far as the person was observed.
  SELECT
    i.person_id,
    min(s.start_date) AS readmitted,
    min(d.death_date) AS died
  FROM index_stays i
  LEFT JOIN stays s ON s.person_id = i.person_id AND s.start_date > i.index_date AND s.start_date <= i.followed_until
  LEFT JOIN death d ON d.person_id = i.person_id AND d.death_date <= i.followed_until
  GROUP BY i.person_id
)
SELECT
  p.person_id,
  i.index_date,
  year(i.index_date) - p.year_of_birth AS age,
  p.gender_concept_id AS gender,
  i.length_of_stay,
  v.visits,
  COALESCE(c.kidney_disease, 0) AS kidney_disease,
  COALESCE(c.diabetes, 0) AS diabetes,
  COALESCE(c.atrial_fibrillation, 0) AS atrial_fibrillation,
  COALESCE(c.copd, 0) AS copd,
  COALESCE(d.furosemide, 0) AS furosemide,
  COALESCE(d.lisinopril, 0) AS lisinopril,
  COALESCE(d.bisoprolol, 0) AS bisoprolol,
  l.creatinine,
  l.sodium,
  l.hemoglobin,
  -- Readmission or death within 30 days; unknown where the observation ended before without either.
  CASE
    WHEN least(f.readmitted, f.died) <= i.index_date + 30 THEN 'event'
    WHEN i.followed_until >= i.index_date + 30 THEN 'no event'
  END AS outcome_30d,
  -- Survival: days until death, or until the observation ended.
  COALESCE(f.died, i.followed_until) - i.index_date AS days,
  CAST(f.died IS NOT NULL AS INTEGER) AS died
FROM index_stays i
JOIN person p USING (person_id)
LEFT JOIN past_visits v USING (person_id)
LEFT JOIN past_conditions c USING (person_id)
LEFT JOIN past_drugs d USING (person_id)
LEFT JOIN last_values l USING (person_id)
LEFT JOIN follow_up f USING (person_id)
ORDER BY p.person_id
