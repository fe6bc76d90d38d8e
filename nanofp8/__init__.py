"""What train.py is built from. Importing the package imports nothing."""
