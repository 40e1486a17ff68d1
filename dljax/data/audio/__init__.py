"""Sound: recordings with their transcripts."""
