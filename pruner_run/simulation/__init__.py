"""A robot to try the policy on: gym-aloha's transfer-cube, its expert, and the recorder.

Nothing here imports the simulator until it is used.
"""
