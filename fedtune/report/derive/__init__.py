"""Pure functions of a report's facts, which its builders call and `report verify` calls again."""
