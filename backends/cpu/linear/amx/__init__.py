"""Products of many columns with AMX."""
