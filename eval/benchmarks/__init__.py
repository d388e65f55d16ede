"""Named benchmarks as YAML: prompts, which rows ask for the concept, judges, metrics, settings."""
