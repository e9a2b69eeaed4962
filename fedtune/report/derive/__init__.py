"""What follows from the facts of a report: pure functions, which its builders call and `report verify` calls again."""
