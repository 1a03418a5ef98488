"""What is made from a store: tables, plots, report, notebook, README tables."""
