"""What the examples share. Nothing in this folder is run by itself; the scripts are one folder up."""
