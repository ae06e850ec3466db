"""Raw rows in: readers, formats, sources, and the Example record."""
