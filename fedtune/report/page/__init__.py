"""The page of a report: wording, tables, charts, HTML and PDF."""
