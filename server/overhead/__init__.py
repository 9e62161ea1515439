"""What calibration costs on a running server: rounds of plain and calibrated requests in turn."""
