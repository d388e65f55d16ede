"""Compare methods: trials, tuning, aggregation, pages."""
