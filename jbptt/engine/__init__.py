"""The engine: all that reads the program of a user's step. Outside of this folder nobody sees a program."""
