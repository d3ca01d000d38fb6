"""The command line `transfusion`, and the page."""
