"""The fused fixed-point kernel in Triton: one program walks one trajectory to its end, then takes the next.

Only `plan` and `launch` are meant for use from outside; everything but `plan` needs Triton to import.
"""
