"""Images: labelled images, scenes with boxes and masks, and the transforms of their pixels."""
