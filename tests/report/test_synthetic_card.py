"""The card of synthetic records: what their runs come to together."""

from fedtune.report.synthetic_card import together


def test_what_a_run_began_in_adds_up_with_it() -> None:
    for start, epsilon in (
        (None, 0.3),
        ({"epsilon": 2.0, "delta": 0.1, "unit": "record", "public": False}, 2.3),
        ({"epsilon": None, "delta": None, "unit": None, "public": True}, 0.3),
        ({"epsilon": None, "delta": None, "unit": None, "public": False}, None),
        ({"epsilon": 2.0, "delta": 0.1, "unit": "user", "public": False}, None),
    ):
        runs = [{"epsilon": 0.1, "delta": 1e-5, "unit": "record", "start": start}]
        runs.append({"epsilon": 0.2, "delta": 2e-5, "unit": "record", "start": None})
        assert together(runs)[0] == epsilon, "as a person adds it up"
        assert start or together(runs)[1] == 3e-5
