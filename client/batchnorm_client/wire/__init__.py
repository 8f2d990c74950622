"""What both sides speak: JSON documents, media types, headers, problems, and tensors as bytes."""
