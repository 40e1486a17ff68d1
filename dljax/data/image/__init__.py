"""Images: labelled ones, scenes with boxes and masks, and what is done to their pixels."""
