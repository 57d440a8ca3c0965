"""Simulators to try a policy in, and their scripted experts.

Nothing here imports a simulator until an environment is made.
"""
