"""Settings by base model and kind of concept, as YAML."""
