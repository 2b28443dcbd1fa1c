"""Tasks for lmms-eval that it does not have: EVOKE, OCRVQA and MMDU. Also for its own command: ``--include_path``."""
