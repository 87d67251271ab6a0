"""The implementations of the operators: ``reference``, ``cpu`` (named ``"torch"``) and ``triton``. They share no state."""
