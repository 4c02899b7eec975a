"""The output of a merge: destination, copied files and undo file."""
