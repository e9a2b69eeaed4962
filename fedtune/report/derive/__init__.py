"""Pure functions of a report's facts, called by the report builders and again by `report verify`."""
