"""Whether a calibration helps on labelled data: samples, scoring, statistics, reports."""
