"""The key-value cache, its policies (one a file), and calibration."""
