"""After which layer visual tokens may leave (DyVTE, arXiv 2411.19628): measured on samples, and learned by routers."""

from llm_accel.calibrate.dyvte.calibration import Calibration, calibrate_dyvte

__all__ = ["Calibration", "calibrate_dyvte"]
