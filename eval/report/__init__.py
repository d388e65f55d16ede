"""Reports: the data types, then their writers."""
