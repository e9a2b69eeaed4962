"""One way to show a table, a chart, an amount and a line of text, on a terminal or a page."""
