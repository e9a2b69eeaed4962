"""A report as a page: words, tables, charts, HTML and PDF."""
