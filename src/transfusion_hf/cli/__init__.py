"""The command line `transfusion`, the page, and streamers of text and pictures."""
