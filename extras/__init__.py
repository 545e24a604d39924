"""What is no method: tools around the scripts, run as `python -m extras.NAME` from the top folder."""
