"""Benchmarks of single operations: one module per operation, which declares its cases."""
