"""Images: where they lie (`ImageSource`) and how their bytes become pixels."""
