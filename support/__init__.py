"""What surrounds the computation, one concern a file. Nothing here imports the four modules."""
