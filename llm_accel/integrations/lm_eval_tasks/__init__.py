"""Task files of lm-evaluation-harness; it finds them through ``--include_path``."""
