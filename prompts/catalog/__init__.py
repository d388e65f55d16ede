"""Built-in concepts as data, one YAML file per world."""
