"""What evaluations, the server, calibration and the command line share."""
