"""The parity suite: both backends against the spec, against each other, and against openpi."""
