"""Datasets on disk: reading and writing the LeRobot format, without lerobot."""
