"""What sample sets are worth: conditions, complementarity, distances, quality."""
