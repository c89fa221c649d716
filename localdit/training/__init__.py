"""What `train.py` is made of: data, encoders, initialisation, objective, averaging, run folder."""
