"""One file a data set and norm; each run is a config of plain values."""
