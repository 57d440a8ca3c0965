"""Scales of float8_e4m3fn values, of a row's largest one."""

from typing import Any

SMALLEST = 1e-30  # a row without a larger value is rounded as if it had one


def scale_exponent(bits: Any) -> Any:
    """The power of two by which a value comes into (224, 448]; 448, 1.75 * 2^8, is the largest.

    Args:
        bits: of a positive float32, at least SMALLEST, as an int32; of any framework.

    Returns:
        a float32's exponent, as it is stored: shifted by 23 bits it is the scale, and 254 less it
        the scale's inverse. Of what is not finite it is some finite scale's.
    """
    # What is added carries into the exponent where the fraction is above .75.
    return ((bits + 0x1FFFFF) >> 23) - 8
