"""Images: where they are (`ImageSource`) and how their bytes become pixels."""
