"""Figures from what a run left: metrics of a cell, intervals, comparisons, when a row is void."""
