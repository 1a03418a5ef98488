"""Benchmark of SGLang servers that differ in how experts are placed: arms, blocks, cells, tables, report."""
