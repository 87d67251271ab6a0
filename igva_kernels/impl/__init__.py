"""The operators' implementations: ``reference``, ``cpu`` (named ``"torch"``), ``native``, ``triton``. They share no state."""
